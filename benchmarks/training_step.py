"""`foldconv bench` with two more things in its rounds: the authors' own layers, and the least that DO-Conv can cost.

    python benchmarks/training_step.py resnet18 --methods doconv,orepa --reference ../clones --out results.json

Takes the options of `foldconv bench`, whose `plot` draws what this writes. `--reference` is the folder with clones of
the original repositories (see originals.py); floor.py says what the floor is.
"""

import sys

from floor import Floor
from originals import commit, contestants, locate

from foldconv.errors import FoldConvError
from foldconv.files.atomic import write_json
from foldconv.lab.bench.measure import measure
from foldconv.lab.bench.report import table
from foldconv.lab.cli._bench import add_arguments, config_of, progress
from foldconv.lab.cli._common import Parser, UsageError, check_out
from foldconv.lab.machine import portable
from foldconv.methods import method_from_text


def run(config, reference=None, out=None):
    """What `measure` returns, with the floor, the commits of the originals, and notes on those that are missing."""
    methods = [method_from_text(text).name for text in config.methods]
    originals, notes = locate(reference, methods) if reference else ({}, [])
    floor = None

    def guests(field):
        nonlocal floor
        floor = Floor.of(field)
        return contestants(field[0].network, originals), {Floor.COPY: floor.copy} if floor else {}

    report = measure(config, progress, out, guests)
    for result in report["results"]:
        if floor and result["what"] == "step":
            floor.add_to(result)
    words = ["python benchmarks/training_step.py", report["command"].removeprefix("foldconv bench ")]
    words += ["--reference", portable(reference)] if reference else []
    references = {name: commit(path) for name, path in originals.items()}
    return report | {"command": " ".join(words), "references": references, "notes": notes}


def main(arguments=None):
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--reference", metavar="FOLDER", help="clones, whose layers run as contestants")
    try:
        options = parser.parse_args(arguments)
        if options.out:
            check_out(options.out, force=True)
        report = run(config_of(options), options.reference, options.out)
    except (FoldConvError, OSError, UsageError) as error:
        return f"training_step.py: {error}"
    finally:
        progress("")
    if options.out:
        write_json(options.out, report, indent=1)
    print("\n\n".join([table(report), *report["notes"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
