import os

from runner.disk import KEPT, kept


def test_what_was_made_is_read_again_until_it_is_the_one_that_nobody_read_for_longest(tmp_path):
    made = []

    def keep(number):
        return kept(tmp_path / "squares", number, lambda: made.append(number) or number**2)

    for number in range(KEPT):
        assert keep(number) == number**2
        newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))  # as if made at that second
    assert keep(0) == 0  # is read now
    assert keep(KEPT) == KEPT**2  # one too many: 1 goes
    assert len(list(tmp_path.iterdir())) == KEPT
    assert made == list(range(KEPT + 1))
    keep(0)
    keep(1)
    assert made[KEPT + 1 :] == [1]


def test_what_somebody_else_kept_is_read_though_it_cannot_be_touched(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    assert kept(tmp_path / "squares", 3, lambda: 9) == 9
    monkeypatch.setattr(os, "utime", refuse)
    assert kept(tmp_path / "squares", 3, lambda: 0) == 9
