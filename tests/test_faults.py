"""tests.faults: what it changes, and what it leaves alone."""

import random

from tests.faults import ORDER, draw, faults_of

SOURCE = b'''def double(x):
    """Return 2 * x."""
    if x is not None and x <= 1e3:
        say("2 * x", 5)
        raise UserError(f"{x + 1}")
    x = (x) * 2  # \xc3\xa9
    return x
'''


def test_faults_are_in_the_code_not_in_messages():
    kinds = [[(SOURCE[start:end].decode(), new) for start, end, new in faults] for faults in faults_of(SOURCE)]
    condition = "x is not None and x <= 1e3"
    assert kinds == [
        [("is not", "is"), ("<=", "<"), ("<=", ">"), ("*", "/")], [("1e3", "1001.0"), ("2", "3")],
        [(condition, f"(not ({condition}))")], [('raise UserError(f"{x + 1}")', "pass"), ("x = (x) * 2", "pass")],
    ]


def test_a_fault_goes_into_one_file_or_into_all_four_scripts():
    rng = random.Random(1)
    for part in 3 * list(ORDER):
        where, change, contents = draw(part, rng)
        assert len(contents) == (4 if part == "shared" else 1) and " -> " in change
        for name, content in contents.items():
            compile(content, name, "exec")
