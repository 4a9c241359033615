"""Command lines of the six programs. What is not listed here is refused: silence would teach a wrong lesson."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# One option a word: its long name, or "-" alone for none; "/x" its letter; "=" it takes a value, "?" it may take one.
SRUN = """
jobid= overlap exact mem= nodes/N= ntasks/n= ntasks-per-node= nodelist/w= cpus-per-task/c= cpu-bind= kill-on-bad-exit/K?
wait/W= mpi= input/i= export= job-name/J= gres= gpus-per-node= output/o= error/e= label/l open-mode= chdir/D= exclude/x=
unbuffered/u version/V overcommit/O no-kill/k?
"""
SBATCH = """
parsable nodes/N= ntasks/n= ntasks-per-node= cpus-per-task/c= exclusive? gres= gpus-per-node= output/o= error/e=
job-name/J= comment= no-kill/k? no-requeue requeue time/t= mem= chdir/D= export= nodelist/w= exclude/x= open-mode=
partition/p= wrap= version/V hold/H overcommit/O
"""
SCANCEL = "signal/s= user/u= quiet/Q batch/b full/f me name/n= jobname= state/t= version/V ctld"
SCONTROL = "oneliner/o version/V quiet/Q details/d all/a"
SQUEUE = "steps/s? jobs/j= noheader/h format/o= me user/u= states/t= all/a json version/V name/n= nodelist/w="
SINFO = "Node/N noheader/h format/o= nodes/n= all/a version/V states/t= long/l"


class BadOption(Exception):
    """Says on standard error what is wrong, with an exit code."""

    def __init__(self, words: str, code: int = 2) -> None:
        super().__init__(words)
        self.code = code


def parse(program: str, table: str, argv: Sequence[str], *, permute: bool = False) -> tuple[dict[str, str], list[str]]:
    """Return the options' values ("" where there is none) and the other arguments.

    With `permute` options may follow other arguments, as for squeue; without, those belong to a command.

    Raises:
        BadOption: an option that the fake does not know.
    """
    long_names, letters = _read(table)
    options: dict[str, str] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += words
            break
        if word == "-" or not word.startswith("-"):
            if not permute:
                rest += [word, *words]
                break
            rest.append(word)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name not in long_names:
                raise BadOption(f"fake_slurm: does not know {program} --{name}")
            if long_names[name] == "=" and not equals:
                if not words:
                    raise BadOption(f"{program}: option '--{name}' requires an argument", 255)
                value = words.pop(0)
            elif equals and not long_names[name]:
                raise BadOption(f"{program}: option '--{name}' doesn't allow an argument", 255)
            options[name] = value
        else:
            _letters(program, word[1:], words, letters, long_names, options)
    return options, rest


def number(program: str, name: str, given: Mapping[str, str]) -> int:
    """Return an option's number; 0 where it is not given."""
    text = given.get(name, "0")
    if not text.isdigit():
        raise BadOption(f'{program}: error: Invalid numeric value "{text}" for --{name}.', 1)
    return int(text)


def _letters(
    program: str,
    word: str,
    words: list[str],
    letters: Mapping[str, str],
    kinds: Mapping[str, str],
    into: dict[str, str],
) -> None:
    while word:
        letter, word = word[0], word[1:]
        name = letters.get(letter)
        if name is None:
            raise BadOption(f"fake_slurm: does not know {program} -{letter}")
        if not kinds[name]:
            into[name] = ""
            continue
        if kinds[name] == "=" and not word:
            if not words:
                raise BadOption(f"{program}: option requires an argument -- '{letter}'", 255)
            word = words.pop(0)
        # getopt: an optional value must be glued to its letter.
        into[name], word = word, ""


def _read(table: str) -> tuple[dict[str, str], dict[str, str]]:
    long_names, letters = {}, {}
    for word in table.split():
        found = re.fullmatch(r"([\w-]+)(?:/(\w))?([=?]?)", word)
        assert found, word
        long_names[found[1]] = found[3]
        if found[2]:
            letters[found[2]] = found[1]
    return long_names, letters
