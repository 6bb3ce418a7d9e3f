"""``python web_demo.py --ckpt DIR``: the documents' command for ``evomesh chat``."""

from evomesh.cli.serve import chat_shim

if __name__ == "__main__":
    chat_shim()
