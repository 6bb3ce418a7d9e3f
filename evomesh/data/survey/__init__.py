"""Describe a data folder in figures for a page: lengths, duplicates, scripts, token frequencies, loss by packing.

documents: files -> SurveyDocument, one at a time, all or evenly spaced ones
duplicates, scripts, frequencies: what is counted over them, in bounded memory
packing_loss: what a config's packs leave out, pad and split, from the lengths alone
survey: all of it as one JSON value
"""
