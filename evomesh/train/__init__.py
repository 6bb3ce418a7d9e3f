"""Build every object of a run from its config in one visible order, and train.

    launcher -> process group -> agreement -> build -> loop of steps -> exit code
    launchers      launch        agreement    build      trainer          main

    a step: batch -> schedule -> gradients -> update -> tally     (step, stages, tally)
    between steps: validation, checkpoint, stop, upkeep           (validate, stop, upkeep)

All ranks leave every step with the same verdict; ``job`` and ``signals`` see to it that
all of them end with the same code as well.
"""
