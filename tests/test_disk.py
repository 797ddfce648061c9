import os

from runner.disk import KEPT, kept


def test_what_was_made_is_read_again_and_the_oldest_files_go(tmp_path):
    made = []

    def keep(number):
        return kept(tmp_path / "squares", number, lambda: made.append(number) or number**2)

    for number in range(KEPT + 2):
        assert keep(number) == number**2
        newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))  # as if made at that second
    assert len(list(tmp_path.iterdir())) == KEPT
    assert keep(KEPT) == KEPT**2
    assert len(made) == KEPT + 2
    keep(0)  # had gone
    assert len(made) == KEPT + 3
