"""Benchmark scores: tasks of lm-evaluation-harness, run on the native model.

task file -> harness -> texts -> log-likelihoods or completions -> scores
              (run)      (native, on the engine of generate)       (run)
"""
