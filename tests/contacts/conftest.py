"""Contacts: what other folders of tests have, and how many contacts of which kind had which verdict."""

import sys
from collections import Counter, defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / folder) for folder in ("models", "encoders", "data"))]


def pytest_terminal_summary(terminalreporter):
    verdicts, seconds = defaultdict(Counter), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            contact = dict(getattr(report, "user_properties", ())).get("contact")
            if contact is not None and report.when == "call":
                kind, verdict = contact
                verdicts[kind][verdict if report.passed else "WRONG"] += 1
                seconds[kind] += report.duration
    for kind, counts in sorted(verdicts.items()):
        each = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        terminalreporter.write_line(f"contacts: {kind}: {each}; {seconds[kind]:.1f} s")
