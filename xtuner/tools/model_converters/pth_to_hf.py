"""Run tools/model_converters/pth_to_hf.py by XTuner's path of it."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    runpy.run_path(
        str(ROOT / "tools" / "model_converters" / "pth_to_hf.py"), run_name="__main__"
    )
