"""Every status has one sentence."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import status


def test_codes_and_messages():
    codes = [status.RUNNING, status.EOS, status.LENGTH, status.NONFINITE, status.STOP]
    assert codes == [0, 1, 2, 3, 4]
    assert sorted(status.MESSAGES) == codes
    assert len(set(status.MESSAGES.values())) == len(codes)
    assert "max_new_tokens" in status.message(status.LENGTH)
    assert "end-of-sequence" in status.message(status.EOS)
    assert "stop sequence" in status.message(status.STOP)
    assert "NaN" in status.message(status.NONFINITE)


def test_codes_from_arrays():
    for code in (np.int32(2), jnp.int32(2), jnp.array([2])[0]):
        assert status.message(code) == status.message(2)


@pytest.mark.parametrize("code", [-1, 5, 99])
def test_no_such_code(code):
    with pytest.raises(ValueError, match=f"{code} is not a status; the codes are"):
        status.message(code)
