"""The document, the table, the client and the contract name the same things."""

import inspect
import re
from typing import Any

import pytest

from aufsd import results as answers
from aufsd.rpc import discover
from aufsd.rpc.methods import TABLE
from aufsd.store.ids import is_id
from aufsd_client import Client, calls, results
from aufsd_client.errors import BY_NAME
from tests.rpc.raw_peer import name
from tests.rpc.serving import Connect, Served

# docs/api.md: parameters in their order, those without a default first
CONTRACT: dict[str, str] = {
    "version": "",
    "ping": "",
    "status": "",
    "health": "",
    "metrics": "",
    "exists": "id",
    "create": "id parent='' mount_label='' storage_opt={}",
    "remove": "id force=False",
    "get": "id mount_label='' hold='manual' name='' read_only=False",
    "put": "id name=''",
    "diff": "id fd parent='' digest=False",
    "apply_diff": "id fd parent='' digest=False",
    "diff_size": "id parent=''",
    "usage": "id",
    "seal": "id",
    "changes": "id parent='' after='' limit=10000",
    "get_metadata": "id",
    "cleanup": "",
    "list": "after='' limit=1000 prefix=''",
    "mounts": "",
    "holders": "id",
    "check": "id='' deep=False repair=False",
    "checkpoint": "id as",
    "rollback": "id to=''",
    "squash": "id onto",
    "convert": "id to",
    "rpc.discover": "",
}
MONITOR = {"version", "ping", "status", "health", "metrics", "rpc.discover"}
# docs/api.md, "Errors"
ERRORS: dict[str, int] = {
    "ParseError": -32700,
    "InvalidRequest": -32600,
    "MethodNotFound": -32601,
    "InvalidParams": -32602,
    "InvalidLayerId": -32602,
    "InvalidLabel": -32602,
    "InvalidDescriptor": -32602,
    "InternalError": -32603,
    "ShuttingDown": -32000,
    "Overloaded": -32001,
    "LayerNotFound": 101,
    "LayerExists": 102,
    "ParentNotFound": 103,
    "LayerHasChildren": 104,
    "LayerInUse": 105,
    "LayerDamaged": 106,
    "ModeConflict": 107,
    "LayerSealed": 108,
    "MountFailed": 201,
    "UnmountBusy": 202,
    "BackendUnsupported": 203,
    "IncompatibleFilesystem": 204,
    "TooManyLayers": 205,
    "LabelConflict": 206,
    "ConversionNeeded": 207,
    "BadArchive": 301,
    "ArchiveEscape": 302,
    "StreamBroken": 303,
    "LimitExceeded": 304,
    "NoSpace": 305,
    "PermissionDenied": 401,
    "StoreNotAdopted": 501,
    "StoreLocked": 502,
}

DOCUMENT: Any = discover.document(TABLE)
METHODS: dict[str, Any] = {method["name"]: method for method in DOCUMENT["methods"]}


def written(parameter: Any) -> str:
    if parameter["required"]:
        return str(parameter["name"])
    return f"{parameter['name']}={parameter['schema']['default']!r}"


def test_the_document_has_the_methods_and_parameters_of_the_contract() -> None:
    found = {name: " ".join(map(written, method["params"])) for name, method in METHODS.items()}
    assert found == CONTRACT


def test_the_document_has_the_errors_of_the_contract() -> None:
    errors = DOCUMENT["components"]["errors"]
    assert {name: error["code"] for name, error in errors.items()} == ERRORS
    assert set(BY_NAME) == {*ERRORS, "AufsdError"}


def test_every_method_says_what_it_is_for() -> None:
    assert [name for name, method in METHODS.items() if not method["summary"].endswith(".")] == []


def test_every_reference_of_the_document_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [found for each in value for found in references(each)]
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + references(list(value.values()))
        return []

    found = references(DOCUMENT)
    assert found
    for reference in found:
        where = DOCUMENT
        for key in reference.removeprefix("#/").split("/"):
            where = where[key]


@pytest.mark.parametrize("method", CONTRACT)
def test_the_client_has_the_method_with_the_same_parameters(method: str) -> None:
    name = "discover" if method == "rpc.discover" else method
    own = list(inspect.signature(getattr(Client, name)).parameters.values())[1:]
    # the client's own: a descriptor is sent for whatever "out" or "source" is, and what is no error
    local = {"out", "source", "in_use_ok"}
    wanted = {parameter["name"] for parameter in METHODS[method]["params"]} - {"fd"}
    # one that is a keyword of Python has an underscore behind it
    assert {parameter.name.rstrip("_") for parameter in own} - local == wanted
    required = [each["name"] for each in METHODS[method]["params"] if each["required"]]
    given = [each.name for each in own if each.default is inspect.Parameter.empty]
    assert [
        {"out": "fd", "source": "fd", "as_": "as"}.get(each, each) for each in given
    ] == required


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(results).values()
        if getattr(kind, "__module__", "").endswith("results")
    ],
)
def test_the_clients_results_have_the_fields_of_the_answers(kind: type) -> None:
    answer = getattr(answers, kind.__name__)
    assert set(kind.__annotations__) == set(answer.__struct_fields__)


def test_every_call_of_the_client_is_a_method_of_the_document() -> None:
    assert calls.ping().method in METHODS


async def test_it_is_served(served: Served, connect: Connect) -> None:
    answer = await connect(served.monitor).ask("rpc.discover")
    assert answer["result"] == DOCUMENT


@pytest.mark.parametrize("method", CONTRACT)
async def test_the_monitor_socket_serves_what_is_marked_and_denies_the_rest(
    served: Served, connect: Connect, method: str
) -> None:
    answer = await connect(served.monitor).ask(method, **({} if method in MONITOR else {"id": "a"}))
    if method in MONITOR:
        assert "result" in answer
    else:
        assert (answer["error"]["code"], name(answer)) == (401, "PermissionDenied")
        assert served.driver.calls == []


async def test_a_method_that_does_not_exist_is_not_found_there_either(
    served: Served, connect: Connect
) -> None:
    assert name(await connect(served.monitor).ask("nothing")) == "MethodNotFound"


@pytest.mark.parametrize("method", CONTRACT)
async def test_the_control_socket_serves_every_method(
    served: Served, connect: Connect, method: str
) -> None:
    served.driver.parents["a"] = None
    params: dict[str, object] = {"id": "a"} if "id" in CONTRACT[method] else {}
    if method == "convert":
        params["to"] = "overlay"
    if method == "checkpoint":
        params["as"] = "b"
    if method == "squash":
        params["onto"] = ""
    if method.endswith("diff"):
        params["fd"] = 0
    answer = await connect(served.control).ask(method, **params)
    wanted = {
        "create": "LayerExists",
        "diff": "InvalidDescriptor",
        "apply_diff": "InvalidDescriptor",
    }
    if method in wanted:
        assert name(answer) == wanted[method]
    else:
        assert isinstance(answer["result"], dict)


@pytest.mark.parametrize("method", [name for name, text in CONTRACT.items() if "id" in text])
def test_the_pattern_of_an_id_takes_what_the_daemon_takes(method: str) -> None:
    schemas = {each["name"]: each["schema"] for each in METHODS[method]["params"]}
    for parameter in ("id", "parent"):
        if parameter not in schemas:
            continue
        pattern = schemas[parameter]["pattern"]
        for id in ("a", "0", "A-b_c.d", "x" * 200, "a-removing-b", "", "a/b", ".a", "x-removing"):
            optional = schemas[parameter].get("default") == ""
            assert bool(re.search(pattern, id)) == (is_id(id) or (optional and not id)), id


def test_every_method_names_the_errors_of_its_own() -> None:
    named = {
        method: {each["$ref"].rpartition("/")[2] for each in row["errors"]}
        for method, row in METHODS.items()
    }
    assert {"LayerNotFound", "MountFailed", "LabelConflict"} <= named["get"]
    assert {"BadArchive", "InvalidDescriptor", "NoSpace"} <= named["apply_diff"]
    assert "LayerNotFound" not in named["ping"]
    assert set().union(*named.values()) <= set(DOCUMENT["components"]["errors"])


def test_the_document_says_how_descriptors_travel() -> None:
    for method in ("diff", "apply_diff"):
        (fd,) = [each for each in METHODS[method]["params"] if each["name"] == "fd"]
        assert "SCM_RIGHTS" in fd["schema"]["description"]
