"""Weight updates: AdamW with sharded state, schedules, loss scale, clipping.

    backward ──► gradients summed over ranks ──► norm ──► clip factor ──► AdamW ──► parameters gathered
       slot             buckets                  clip        clip         adamw          buckets

``zero.ZeroOptimizer`` runs the whole of it.
"""
