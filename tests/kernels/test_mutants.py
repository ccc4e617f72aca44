"""Every fault of ``gpu_free.mutants`` is seen by a check that the unbroken kernel passes.

``make test`` runs one fault for each kernel and check, and ``make test-kernels`` the others; ``make kernels-check``
prints which check saw which.
"""

from dataclasses import replace

import pytest
from gpu_free.host.checks import CHECKS
from gpu_free.host.host import CompileError, missing
from gpu_free.mutant import kernel_name
from gpu_free.mutants import MUTANTS, SOUND, break_kernel, catch
from gpu_free.selection import covering, selected_cases

from medseg_trt.kernels import KERNELS, load


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.mark.parametrize(
    "name", covering(MUTANTS, lambda name: (kernel_name(MUTANTS[name].entry), MUTANTS[name].checks))
)
def test_a_mutant_is_caught(name, tmp_path):
    check, seen = catch(MUTANTS[name], tmp_path)
    assert check, f"{name}: none of {', '.join(MUTANTS[name].checks)} sees it"
    assert seen


EXECUTING = {"host", "threads", "ptx"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MUTANTS if EXECUTING & set(MUTANTS[name].checks)])
def test_the_host_build_and_the_interpreter_both_see_it(name, tmp_path):
    """A fault that running a kernel can show is shown by each of the two ways to run it, without the other's help."""
    kernel, entry = break_kernel(MUTANTS[name], tmp_path)
    seen = {check: CHECKS[check](kernel, entry, MUTANTS[name].kernel) for check in sorted(EXECUTING)}
    assert seen["host"] or seen["threads"]
    assert seen["ptx"]


@pytest.mark.parametrize(("entry", "check"), covering(SOUND, lambda entry, check: (kernel_name(entry), check)))
def test_the_unbroken_kernel_passes(entry, check):
    kernel = load(kernel_name(entry))
    assert not CHECKS[check](kernel, kernel.entry(entry), kernel)


def test_every_kernel_and_every_check_has_a_mutant():
    assert {kernel_name(mutant.entry) for mutant in MUTANTS.values()} == set(KERNELS)
    assert {check for mutant in MUTANTS.values() for check in mutant.checks} == set(CHECKS)


def test_make_test_has_a_mutant_of_every_kernel_and_every_check_and_loses_none():
    names = [name for (name,) in selected_cases(test_a_mutant_is_caught)]
    assert {kernel_name(MUTANTS[name].entry) for name in names} == set(KERNELS)
    assert {check for name in names for check in MUTANTS[name].checks} == set(CHECKS)
    assert {check for _, check in selected_cases(test_the_unbroken_kernel_passes)} == set(CHECKS)
    cases = test_a_mutant_is_caught.pytestmark[0].args[1]
    assert [case.values for case in cases] == [(name,) for name in MUTANTS]


def test_equivalent_mutant_survives_host_ptx_traffic_and_static_checks(tmp_path):
    harmless = replace(MUTANTS["epsilon outside the root"], new="__fsqrt_rn(__fadd_rn(norm.epsilon, mean))")
    assert catch(replace(harmless, checks=("host", "ptx", "traffic", "static")), tmp_path) == ("", "")


@pytest.mark.parametrize("old", ["no such text", "width"])
def test_a_mutant_whose_text_is_not_there_once_is_an_error(tmp_path, old):
    with pytest.raises(ValueError, match="a mutant needs one"):
        break_kernel(replace(next(iter(MUTANTS.values())), old=old), tmp_path)


def test_a_mutant_that_does_not_compile_is_not_caught(tmp_path):
    with pytest.raises(CompileError):
        catch(replace(MUTANTS["epsilon outside the root"], new="no such name"), tmp_path)
