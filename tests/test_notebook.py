"""The notebook runs as it stands, says what it shows, and is committed with its outputs."""

import base64
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "two_futures.ipynb"
SECONDS = 100
PLOT_BYTES = 200_000


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def text(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def plots(notebook) -> list[bytes]:
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", ())]
    return [base64.b64decode(plot) for plot in found]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}  # small matrices: more threads wait for each other
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute(env=quiet)
    return notebook


@pytest.fixture(params=["committed", "executed"])
def notebook(request):
    return request.getfixturevalue(request.param)


pytestmark = [
    pytest.mark.timeout(SECONDS + 20),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Jupyter's packages
]


def test_every_cell_ran_without_an_error(notebook) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


def test_the_count_comes_before_the_bytes_and_the_logits_are_the_same(notebook) -> None:
    said = text(notebook)
    (counted,) = re.findall(r"([\d.]+) ms  lookup_done: 2,048 tokens are cached, 8 MiB to load", said)
    (loaded,) = re.findall(r"([\d.]+) ms  load_done: 2,048 tokens are in memory", said)
    assert float(counted) < float(loaded)
    assert float(loaded) > 800  # 8 MiB at 10 MiB a second
    assert "5 tokens were computed; the logits are the same: True" in said


def test_the_scheduler_with_the_count_is_the_fastest(notebook) -> None:
    in_order, loaded_first, with_the_count = map(float, re.findall(r"first token after ([\d.]+) s", text(notebook)))
    assert in_order > with_the_count
    assert loaded_first > with_the_count - 0.05  # beside other work, what a load has left may be misjudged


def test_a_fault_makes_the_prefix_shorter_and_says_why(notebook) -> None:
    rows = re.findall(r"^(\S.*?) +8 +(\d) +(\w+) +(True|False)$", text(notebook), re.MULTILINE)
    assert [(chunks, shortfall, same) for _, chunks, shortfall, same in rows] == [
        ("8", "None", "True"),
        ("3", "backend_error", "True"),
        ("3", "corrupt", "True"),
        ("3", "deadline", "True"),
    ]


def test_the_sweeper_gives_everything_back(notebook) -> None:
    said = text(notebook)
    assert re.search(r"^before 10 requests, 20 leases, 20 MiB leased,  0 swept, 20 chunks cached$", said, re.MULTILINE)
    assert re.search(r"^after +0 requests, +0 leases, +0 MiB leased, 10 swept, 20 chunks cached$", said, re.MULTILINE)


def test_its_plots_are_there_and_of_a_moderate_size(notebook) -> None:
    assert len(plots(notebook)) == 3
    assert all(len(plot) < PLOT_BYTES for plot in plots(notebook))


def test_the_readme_shows_its_second_plot(committed) -> None:
    assert plots(committed)[1] == (NOTEBOOK.parents[1] / "docs" / "two_futures.png").read_bytes()


def test_no_path_of_a_machine_is_committed() -> None:
    assert not re.search(r"/(home|root|work|usr|Users|tmp)/", NOTEBOOK.read_text())
