"""Prediction of what a run holds and sends, without running it.

config -> world of fake ranks -> one traced step -> tensors held, messages sent
                             trace
"""
