import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parents[1] / "models"), str(Path(__file__).parent)]
