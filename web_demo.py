"""``python web_demo.py --ckpt DIR``: InternEvo's name for ``evomesh chat``."""

from evomesh.cli.serve import chat_shim

if __name__ == "__main__":
    chat_shim()
