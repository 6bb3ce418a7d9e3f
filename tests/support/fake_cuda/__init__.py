"""Training steps on tensors that say "cuda" and have no values, in torch's build without CUDA.

device.cpp -> a library that torch takes for the CUDA device (build)
    -> tensors without values, and what would make the host wait (mode)
    -> training steps in a process that has loaded the library (steps)
"""
