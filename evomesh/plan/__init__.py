"""Prediction of what a run holds, sends and takes, without running it.

config -> world of fake ranks -> one traced step -> tensors held, messages sent -> peak of memory
                             trace                                              memory
                                                 -> events of its streams       -> seconds of a step -> best layout
                                                    timeline          simulate, pipeline_time        search
"""
