"""Run tools/get_data_order.py by XTuner's path of it."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "tools" / "get_data_order.py"), run_name="__main__")
