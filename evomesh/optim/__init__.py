"""How weights are updated: AdamW with divided state, schedules, loss scale, clipping."""
