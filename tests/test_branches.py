"""The planner: no input makes a call that the kernel would cut, refuse or choke on."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aufsd.kernel.syscalls import MS_RDONLY, MS_REMOUNT
from aufsd.union.branches import (
    DATA_MAX,
    LOWERS_MAX,
    OPTIONS_MAX,
    MountCall,
    longest,
    plan_aufs,
    plan_overlay,
)
from aufsd_client.errors import InvalidLabel, TooManyLayers

# no lone surrogates: neither a label nor a path of ours can hold one (store/ids.py)
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
PATHS = st.one_of(
    st.text(CHARACTERS, min_size=1, max_size=300).map(lambda text: f"/{text}"),
    st.integers(0, 10**9).map(lambda number: f"/store/diff/{number:064x}"),
)
# few draws, long chains: the paths of a chain are one path with a number behind it
CHAINS = st.builds(
    lambda path, length: [f"{path}{n}" for n in range(length)], PATHS, st.integers(1, 1100)
)
LABELS = st.one_of(st.just(""), st.text(CHARACTERS, max_size=255), st.just("a:b:c:s0:c1,c2"))
OPTIONS = st.sampled_from([(), ("dio",), ("dio", "dirperm1")])


def bytes_of(call: MountCall) -> int:
    """What the kernel gets, at the worst."""
    names = ["999999"] * len(call.dirs) if call.by_number else call.dirs
    return len(call.data.format(*names).encode("utf-8", "surrogateescape"))


def options_of(call: MountCall) -> int:
    """Every comma and, in `br:`, every branch: no call of ours has more colons or commas."""
    data = call.data.format(*["N"] * len(call.dirs))
    branches = data.partition(",")[0].count("=") if data.startswith("br:") else 1
    return branches + data.count(",")


@given(CHAINS, PATHS, st.booleans(), OPTIONS, LABELS, st.sampled_from([127, 511, 1023, 32767]))
def test_no_chain_makes_an_aufs_call_too_long(
    chain: list[str], work: str, read_only: bool, options: tuple[str, ...], label: str, limit: int
) -> None:
    try:
        calls = plan_aufs(
            "/mnt",
            chain,
            work=work,
            read_only=read_only,
            options=options,
            label=label,
            limit=limit,
        )
    except TooManyLayers:
        assert len(chain) > limit
        return
    except InvalidLabel:
        assert label.count(",") > 40 or len(label.encode("utf-8", "surrogatepass")) > 255
        return
    assert len(chain) <= limit
    for call in calls:
        assert bytes_of(call) == longest(call) <= DATA_MAX
        assert options_of(call) <= OPTIONS_MAX
        assert not label or call.data.endswith('"')
        assert bool(call.flags & MS_RDONLY) == read_only
    # the branches, each once and in order, behind the work directory
    assert calls[0].dirs[0] == work
    assert [path for call in calls for path in call.dirs][1:] == chain
    assert [bool(call.flags & MS_REMOUNT) for call in calls] == [False] + [True] * (len(calls) - 1)
    modes = [mode for call in calls for mode in re.findall(r"\}=(rw|ro\+wh)", call.data)]
    assert modes == ["ro+wh" if read_only else "rw"] + ["ro+wh"] * (len(chain) - 1)


@given(CHAINS, st.none() | st.tuples(PATHS, PATHS), LABELS)
def test_no_chain_makes_an_overlay_call_too_long(
    chain: list[str], ends: tuple[str, str] | None, label: str
) -> None:
    upper, work = ends or ("", "")
    options = ("index=off", "metacopy=off", "redirect_dir=nofollow", "userxattr")
    try:
        call = plan_overlay("/mnt", chain, upper=upper, work=work, options=options, label=label)
    except TooManyLayers:
        assert len(chain) > LOWERS_MAX
        return
    except InvalidLabel:
        assert label.count(",") > 40 or len(label.encode("utf-8", "surrogatepass")) > 255
        return
    assert len(chain) <= LOWERS_MAX
    assert bytes_of(call) == longest(call) <= DATA_MAX
    assert call.dirs == (*chain, *(ends or ()))
    assert call.flags == (0 if ends else MS_RDONLY)


def test_a_short_chain_reads_as_docker_wrote_it() -> None:
    (call,) = plan_aufs(
        "/s/mnt/c",
        ["/s/diff/c", "/s/diff/b", "/s/diff/a"],
        work="/s/.aufsd/work/c",
        options=("dio", "dirperm1"),
        label="system_u:object_r:svirt_lxc_file_t:s0:c1,c2",
    )
    assert not call.by_number
    assert call.render(call.dirs) == (
        "br:/s/diff/c=rw:/s/diff/b=ro+wh:/s/diff/a=ro+wh,dio,dirperm1,xino=/s/.aufsd/work/c/xino,"
        'context="system_u:object_r:svirt_lxc_file_t:s0:c1,c2"'
    )


def test_further_branches_are_appended_with_the_label_on_every_call() -> None:
    calls = plan_aufs(
        "/m", [f"/{n}" for n in range(170)], work="/w", options=("dio",), label="l", limit=511
    )
    assert [len(call.dirs) for call in calls] == [1 + 77, 79, 14]
    assert calls[1].render(range(10, 89)).startswith("append:10=ro+wh,append:11=ro+wh,")
    assert all(call.data.endswith(',context="l"') for call in calls)


def test_500_branches_are_7_aufs_calls_and_one_overlay_call() -> None:
    paths = [f"/var/lib/aufsd/diff/{n:064x}" for n in range(500)]
    assert len(plan_aufs("/m", paths, work="/w", options=("dio", "dirperm1"), limit=511)) == 7
    call = plan_overlay("/m", paths[1:], upper=paths[0], work="/w")
    assert call.by_number
    assert len(call.render(range(3, 504))) < 2000


def test_a_chain_by_path_is_used_up_to_the_last_byte_of_the_page() -> None:
    path = f"/{'p' * 400}"
    paths = [path] * 10
    spare = DATA_MAX - longest(plan_overlay("/m", paths))
    assert spare > 0
    fits = [*paths[:-1], path + "x" * spare]
    call = plan_overlay("/m", fits)
    assert not call.by_number
    assert longest(call) == DATA_MAX
    assert plan_overlay("/m", [*fits[:-1], f"{fits[-1]}x"]).by_number


@pytest.mark.parametrize("special", list(",:=\"'\\# \t\n"))
def test_a_separator_in_any_path_means_numbers(special: str) -> None:
    odd = f"/a{special}b"
    assert plan_overlay("/m", ["/x", odd]).by_number
    assert plan_overlay("/m", ["/x"], upper="/u", work=odd).by_number
    assert plan_aufs("/m", ["/x", odd], work="/w")[0].by_number
    assert plan_aufs("/m", ["/x"], work=odd)[0].by_number
    # the mount point is an argument of its own
    assert not plan_overlay(odd, ["/x", "/y"]).by_number


def test_braces_in_a_label_are_no_placeholders() -> None:
    call = plan_overlay("/m", ["/{0}", "/{1"], label="{0}{}{")
    assert call.render(call.dirs) == 'lowerdir=/{0}:/{1,context="{0}{}{"'
    assert str(call) == 'mount -t overlay -o lowerdir=/{0}:/{1,context="{0}{}{" /m'


def test_too_many_layers_says_how_many_there_may_be() -> None:
    with pytest.raises(TooManyLayers) as caught:
        plan_aufs("/m", ["/x"] * 128, work="/w", limit=127)
    assert caught.value.data == {"layers": 128, "limit": 127}
