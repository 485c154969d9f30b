"""A ledger loses nothing, notices everything, and forgets when it is told to."""

import json
import logging
import os
import stat

import pytest

from r2t2_jax import ledger as ledger_module
from r2t2_jax.ledger import Head, Ledger, read, verify
from tests.r2t2_jax.made_up import decisions, recorded


@pytest.fixture
def path(tmp_path):
    """A ledger of six records."""
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(recorded()[:4])
        ledger.append(recorded()[4:])
    return tmp_path / "ledger.jsonl"


def contents(path):
    """Records as they were before they got a place; the time aside."""
    return [{k: v for k, v in record.items() if k not in ("sequence", "time")} for record in read(path)]


def untimed(records):
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def test_records_come_back_as_they_were_with_their_place(path):
    assert contents(path) == untimed(recorded())
    assert [record["sequence"] for record in read(path)] == [1, 2, 3, 4, 5, 6]
    assert all(record["time"].endswith("+00:00") for record in read(path))


def test_a_ledger_that_is_opened_again_goes_on(path):
    with Ledger(path) as ledger:
        before = ledger.head
        ledger.append(recorded(decisions(2, seed=1)))
        ledger.append([])
    assert before.sequence == 6 and verify(path, before).sequence == 8
    assert contents(path) == untimed(recorded() + recorded(decisions(2, seed=1)))


def test_opening_does_not_read_the_whole_file(path, monkeypatch):
    monkeypatch.setattr(ledger_module, "BLOCK", 1 << 10)  # less than a line, so that the search has to widen
    monkeypatch.setattr(ledger_module, "_lines", None)
    with Ledger(path) as ledger:
        monkeypatch.undo()
        assert ledger.head == verify(path)


def test_only_its_owner_can_read_it(path):
    with Ledger(path) as ledger:
        ledger.redact(input_id="x1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_batch_is_written_in_one_go(path, monkeypatch):
    writes, real = [], os.write
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "write", lambda file, block: writes.append(block) or real(file, block))
        ledger.append(recorded())
    assert len(writes) == 1 and writes[0].count(b"\n") == 6


@pytest.mark.parametrize("failure", ["short write", "no sync"])
def test_a_full_disk_leaves_none_of_a_batch_and_the_ledger_usable(failure, path, monkeypatch):
    before, real = path.read_bytes(), os.write

    def no_sync(file):
        raise OSError(28, "No space left on device")

    with Ledger(path) as ledger:
        if failure == "short write":
            monkeypatch.setattr(os, "write", lambda file, block: real(file, block[:2000]))
        else:
            monkeypatch.setattr(os, "fsync", no_sync)
        with pytest.raises(OSError, match="No space left"):
            ledger.append(recorded())
        monkeypatch.undo()
        assert path.read_bytes() == before
        ledger.append(recorded())
    assert verify(path).sequence == 12


@pytest.mark.parametrize("cut", [1, 100, 1500])
def test_a_line_that_a_crash_cut_short_is_dropped_and_reported(cut, path, caplog):
    whole = path.read_bytes()
    torn = whole.splitlines(keepends=True)[-1][:-cut]
    path.write_bytes(whole + torn)
    assert contents(path) == untimed(recorded())  # readers do not count it
    with caplog.at_level(logging.WARNING), Ledger(path) as ledger:
        assert ledger.head.sequence == 6
    assert path.read_bytes() == whole
    assert f"these {len(torn)} bytes are dropped" in caplog.text


def test_a_crash_while_the_torn_line_is_dropped_loses_nothing(path, monkeypatch):
    torn = path.read_bytes() + b'{"sequence": 7, "prev'
    path.write_bytes(torn)
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Ledger(path)
    assert path.read_bytes() == torn and list(path.parent.iterdir()) == [path]


def test_a_ledger_has_one_writer(path):
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="is being written by another process"):
            Ledger(path)
        ledger.redact(input_id="x1")  # puts another file in its place
        with pytest.raises(ValueError, match="is being written by another process"):
            Ledger(path)
    Ledger(path).close()


def test_what_is_closed_writes_nowhere(path, tmp_path):
    ledger = Ledger(path)
    ledger.close()
    with open(tmp_path / "another's", "w+b", buffering=0) as other:  # gets the number of the closed file
        for write in (lambda: ledger.append(recorded()), lambda: ledger.redact(input_id="scene-0")):
            with pytest.raises(ValueError, match="this ledger was closed; open it again to write"):
                write()
        ledger.close()
        assert other.write(b"mine") == 4
    assert (tmp_path / "another's").read_bytes() == b"mine" and len(read(path)) == 6


def test_a_link_to_a_ledger_stays_a_link(path, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(path)
    with Ledger(link) as ledger:
        ledger.redact(input_id="x1")
    assert link.is_symlink() and "redacted" in read(path)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dear diary\n", "is no ledger of decisions; give another path"),
        (b'{"step": 1}\n', "is no ledger"),
        (b"[]\n", "is no ledger"),
        (b'{"content": {"ledger": "of somebody else", "format": 1}}\n', "is no ledger"),
        (
            b'{"content": {"ledger": "r2t2_jax decisions", "format": 2}}\n',
            "is a ledger of format 2, this version knows 1",
        ),
    ],
)
def test_what_is_no_ledger_of_this_version_is_left_alone(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    for use in (Ledger, read, verify):
        with pytest.raises(ValueError, match=message):
            use(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_a_last_line_that_is_no_line_of_a_ledger_is_refused(path):
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match="the last line is no line of a ledger"):
        Ledger(path)
    with pytest.raises(ValueError, match="line 8 is no line of a ledger"):
        read(path)


def edited(path, edit):
    """Rewrites the file with its list of lines changed in place."""
    lines = path.read_text().splitlines(keepends=True)
    edit(lines)
    path.write_text("".join(lines))


def swap(lines):
    lines[3], lines[4] = lines[4], lines[3]


def without(field):
    def edit(lines):
        line = json.loads(lines[3])
        del line[field]
        lines[3] = json.dumps(line) + "\n"

    return edit


def feign(lines):
    """Changes a record under the pretence that it was redacted."""
    line = json.loads(lines[3].replace('"x2"', '"y2"'))
    lines[3] = json.dumps(line | {"redacted": "2026-01-01"}) + "\n"


def forge(lines):
    """Changes a record, makes its digest anew, and mends the next line to follow it."""
    changed, following = (json.loads(line) for line in lines[3:5])
    text = json.dumps(changed["content"] | {"strategy": "another"})
    changed |= {"content": json.loads(text), "digest": ledger_module._digest(changed["salt"], text)}
    following["previous"] = ledger_module._head_of(changed).seal
    lines[3:5] = [json.dumps(line) + "\n" for line in (changed, following)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines.__setitem__(3, lines[3].replace('"x2"', '"y2"')), "line 4 was changed"),
        (lambda lines: lines.__setitem__(3, lines[3].replace('"digest": "', '"digest": "0')), "line 4 was changed"),
        (without("salt"), "line 4 was changed"),
        (without("content"), "line 4 has lost its content"),
        (without("digest"), "line 4 is no line of a ledger"),
        (feign, "line 4 was changed"),
        (lambda lines: lines.pop(3), "line 4 does not follow the line before"),
        (lambda lines: lines.insert(3, lines[2]), "line 4 does not follow"),
        (swap, "line 4 does not follow"),
        (lambda lines: lines.__setitem__(3, "garbage\n"), "line 4 is no line of a ledger"),
        (
            lambda lines: lines.__setitem__(6, lines[6].replace('"sequence": 6', '"sequence": 9')),
            "line 7 does not follow",
        ),
        (forge, "line 6 does not follow"),
        (lambda lines: lines.__setitem__(0, lines[0].replace("20", "21", 1)), "line [12] "),
    ],
)
def test_whatever_is_done_to_a_line_is_noticed(edit, message, path):
    assert verify(path).sequence == 6
    edited(path, edit)
    with pytest.raises(ValueError, match=message):
        verify(path)


def test_a_line_that_was_replaced_with_its_digest_breaks_the_next(path, tmp_path):
    with Ledger(tmp_path / "other") as other:
        other.append(recorded(decisions(6, seed=9)))
    theirs = (tmp_path / "other").read_text().splitlines(keepends=True)
    edited(path, lambda lines: lines.__setitem__(0, theirs[0]))
    with pytest.raises(ValueError, match="line 2 does not follow"):
        verify(path)


def test_lines_cut_off_the_end_are_noticed_by_who_kept_the_head(path):
    head = verify(path)
    edited(path, lambda lines: lines.pop())
    assert verify(path).sequence == 5
    with pytest.raises(ValueError, match="does not go through sequence 6 as it was"):
        verify(path, head)
    with Ledger(path) as ledger:
        ledger.append(recorded()[:1])
    with pytest.raises(ValueError, match="does not go through sequence 6 as it was"):
        verify(path, head)
    verify(path, Head(**verify(path)._asdict()))


def test_an_input_can_be_deleted_and_the_chain_holds(path):
    head = verify(path)
    with Ledger(path) as ledger:
        assert ledger.redact(input_id="x2") == 1
        assert ledger.redact(input_id="x2") == 0
        assert ledger.head == head
        ledger.append(recorded()[:1])
    assert verify(path, head).sequence == 7
    deleted = read(path)[2]
    assert deleted.keys() == {"redacted", "sequence"} and deleted["sequence"] == 3
    assert '"x2"' not in path.read_text()
    assert json.loads(path.read_text().splitlines()[3]).keys() == {"sequence", "previous", "digest", "redacted"}
    kept = [record for i, record in enumerate(untimed(recorded())) if i != 2] + untimed(recorded()[:1])
    assert [record for record in contents(path) if "input" in record] == kept


def test_a_reference_can_be_deleted_from_every_record_that_names_it(path):
    named = [any(n["id"] == "r3" for n in record["neighbors"]) for record in recorded()]
    assert 0 < sum(named) < 6
    with Ledger(path) as ledger:
        assert ledger.redact(reference_id="r3") == sum(named)
    verify(path)
    assert ["redacted" in record for record in read(path)] == named
    assert '"r3"' not in path.read_text()


def test_deleting_needs_one_id(path):
    with Ledger(path) as ledger:
        for ids in ({}, {"input_id": "x", "reference_id": "r"}):
            with pytest.raises(ValueError, match="either input_id or reference_id"):
                ledger.redact(**ids)


def test_a_digest_gives_nothing_away_about_deleted_content(tmp_path):
    digests = []
    for name in "ab":
        with Ledger(tmp_path / name) as ledger:
            ledger.append([recorded()[0] | {"time": ""}])
        digests.append(json.loads((tmp_path / name).read_text().splitlines()[1])["digest"])
    assert digests[0] != digests[1]  # of the same content: without the salt a guess cannot be confirmed


def test_a_crash_while_deleting_leaves_the_ledger_as_it_was(path, monkeypatch):
    before = path.read_bytes()
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ledger.redact(input_id="x2")
        monkeypatch.undo()
        assert path.read_bytes() == before
        ledger.append(recorded()[:1])
    assert verify(path).sequence == 7


def test_what_is_no_file_is_named_as_by_the_system(tmp_path):
    for use in (read, verify):
        with pytest.raises(FileNotFoundError, match="none"):
            use(tmp_path / "none")
    for use in (read, verify, Ledger):
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            use(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Ledger(tmp_path / "no folder" / "ledger.jsonl")
