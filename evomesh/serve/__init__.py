"""A trained model over HTTP: an OpenAI-style API and a chat page, on one engine.

    request -> guard -> body -> prompt ids -> engine thread -> text -> response
               key_gate  requests  service       loop       detokenizer  answers
               page_security  schema                         token_text

The event loop never works on a long text itself. ``app`` has the routes, ``page`` the
chat page, and ``http_server`` the connections.
"""
