import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, [TESTS.parent / "examples", TESTS / "models", TESTS / "data", TESTS / "examples"])
