"""Prediction of what a run holds, sends and takes, without running it.

config -> world of fake ranks -> one traced step -> tensors held, messages sent -> peak of memory
                             trace                                              memory
                                                 -> events of its streams       -> seconds of a step -> best layout
                                                    timeline          simulate, pipeline_time
small model -> parts of a rank, traced once for each shape -> stages of any layout -> the fastest layouts that fit
               part_trace, part_library                       layout_predictor        search
"""
