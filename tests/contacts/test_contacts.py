"""Uses as the world has them, drawn at random: threads, interrupts, pictures, files and labels.

Each contact makes one use and judges it. It is right, where the result equals one that was computed another way; it is refused,
where a documented exception says by name what is wrong with it; anything else fails. What was used must still work afterwards.

A contact is known by its kind and index: ``pytest "tests/contacts/test_contacts.py::test_contact[files-17]"`` runs one alone.
``MOPE_FAST_CONTACTS=2000`` makes so many of all kinds together (200 by default: the first 40 of each kind), and
``MOPE_FAST_CONTACTS_SEED=1`` others. Counts by verdict stand at the end.
"""

import gc
import os

import contact_files
import contact_interrupts
import contact_labels
import contact_pictures
import contact_threads
import pytest
from judge import Contact, WrongError

KINDS = {
    "threads": contact_threads.run,
    "interrupts": contact_interrupts.run,
    "pictures": contact_pictures.run,
    "files": contact_files.run,
    "labels": contact_labels.run,
}
COUNT = int(os.environ.get("MOPE_FAST_CONTACTS", "200"))
SEED = int(os.environ.get("MOPE_FAST_CONTACTS_SEED", "0"))


@pytest.fixture(scope="module", autouse=True)
def _collected():
    """Where an encoder seems to be taken the library collects garbage, which takes long among the objects of whole packages."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")  # an interrupt may come where nothing can be raised; damaged files are warned of
@pytest.mark.parametrize(
    ("kind", "index"), [pytest.param(kind, index, id=f"{kind}-{index}") for kind in KINDS for index in range(COUNT // len(KINDS))]
)
def test_contact(kind, index, tmp_path, record_property):
    contact = Contact(SEED, kind, index, tmp_path)
    verdict = "WRONG"
    try:
        verdict = KINDS[kind](contact)
    except Exception as error:
        notes = "\n  ".join(contact.notes)
        raise WrongError(f"seed {SEED}, kind {kind}, index {index}:\n  {notes}\n{type(error).__name__}: {error}") from error
    finally:
        record_property("contact", (kind, verdict))
