"""Turn raw records into token files.

tokenize: text records -> token ids -> one .bin
conversations: records -> messages (read_conversation) -> token ids (evomesh.data.chat) -> .bin, held-out .bin
"""
