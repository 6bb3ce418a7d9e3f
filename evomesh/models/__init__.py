"""What is trained: one decoder, small family files, and the registry where users add their own."""
