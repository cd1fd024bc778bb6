"""The list of faults fits the code and the tests; whether they are caught is ``plant.py``'s to say."""

import re
from collections import Counter
from pathlib import Path

from faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_at_least_forty_each_under_a_name_of_its_own():
    assert len(FAULTS) >= 40
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []


def test_each_can_be_planted_and_leaves_a_file_that_compiles():
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        assert source.count(fault.text) == 1, f"{fault.name}: its text is not once in {fault.file}, mend faults.py"
        assert fault.replacement != fault.text, fault.name
        compile(source.replace(fault.text, fault.replacement), fault.file, "exec")


def test_the_tests_that_are_to_catch_them_are_there():
    for fault in FAULTS:
        assert fault.tests, fault.name
        for test in fault.tests:
            file, _, function = test.partition("[")[0].partition("::")
            assert (ROOT / file).is_file(), f"{fault.name}: there is no {file}, name another test"
            found = re.search(rf"^def {function or 'test_'}", (ROOT / file).read_text(), re.MULTILINE)
            assert found, f"{fault.name}: {file} has no {function}, name another test"
