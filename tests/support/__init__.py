"""What all tests share: the pool of ranks, the pre-forked interpreter, golden data, tolerances."""
