"""Text from a trained model.

    prompt -> slot of the cache -> logits of the next token -> token -> text
               engine, cache            engine                 sample    decode

``engine`` gives every running request one token per step, ``beam`` follows several
continuations of one prompt, and ``staged`` lets a model that is distributed over
pipeline stages answer like one in one piece. What a request may ask for is in
``options``.
"""
