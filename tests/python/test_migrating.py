"""The code of docs/migrating.md, run as it stands there, and compared with plain products."""

import pathlib
import re

import pytest
import torch
from punica_kernels import reference
from tolerances import assert_close

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "migrating.md"

pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="the document is not beside the tests")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_code_of_the_document(dtype, device):
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names = {"dtype": dtype, "device": device}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)

    a, b = (names[name][:, names["layer"]].double() for name in ("a", "b"))
    x, chosen = names["x"].double(), names["indices"].tolist()

    def expected(adapters):
        exact, terms, v_terms = (torch.zeros(5, names["hidden"], dtype=torch.float64, device=device) for _ in range(3))
        for row, i in enumerate(adapters):
            if i >= 0:
                v = a[i] @ x[row]
                exact[row], terms[row] = b[i] @ v, b[i].abs() @ (a[i].abs() @ x[row].abs())
                v_terms[row] = b[i].abs() @ v.abs()
        return exact, terms, v_terms

    unit = torch.finfo(dtype).eps  # v is rounded to the type between two calls, but not in add_lora
    for name, adapters, scale, rounded in (
        ("y", chosen, 1.0, 0),
        ("y1", chosen, 1.0, unit),
        ("y2", [2, 2, 2, 0, 0], 1.0, unit),
        ("wide", chosen, 0.5, unit),
    ):
        exact, terms, v_terms = expected(adapters)
        ours = names[name] if name != "wide" else names[name][:, names["hidden"] : 2 * names["hidden"]]
        assert_close(ours, scale * exact, terms=scale * terms, extra=rounded * scale * v_terms)
    assert (names["wide"][:, : names["hidden"]] == 0).all()

    o = torch.empty_like(names["o"], dtype=torch.float64)
    tables = (names["kv_ptrs"], names["kv_indptr"], names["last_page_offset"], None)
    sizes = (names["layers"], names["layer"], names["heads"], names["page"])
    reference.batch_decode(o, names["q_new"], *tables, *sizes, rope_theta=1e4)
    torch.testing.assert_close(names["o"].double(), o, rtol=2e-2, atol=2e-3)
    assert (o != 0).any()
