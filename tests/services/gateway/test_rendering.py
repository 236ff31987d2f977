"""What is rendered from the table of services, and Envoy's own opinion of it; no server runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.gateway.__main__ import validate
from services.gateway.config import Address, load_config
from services.gateway.envoy import bootstrap
from services.gateway.local_replies import refusals
from services.gateway.prometheus import scrape_config
from services.gateway.routes import CATALOG
from services.gateway.strict import message_fields
from shared.api_keys import digest, make_key, parse_rate
from shared.errors import ConfigurationError
from shared.roles import ADMIN_METHODS
from shared.services_table import load_table

ROOT = Path(__file__).parents[3]
TABLE = load_table()


def render(**environment):
    return bootstrap(load_config(environment, TABLE), TABLE)


def connection_manager(rendered):
    (chain,) = rendered["static_resources"]["listeners"][0]["filter_chains"]
    return chain["filters"][0]["typed_config"]


def http_filter(rendered, name):
    filters = connection_manager(rendered)["http_filters"]
    names = (name, f"envoy.filters.http.{name}")
    return next(entry["typed_config"] for entry in filters if entry["name"] in names)


def endpoints(rendered):
    clusters = rendered["static_resources"]["clusters"]
    addresses = {}
    for cluster in clusters:
        (group,) = cluster["load_assignment"]["endpoints"]
        (endpoint,) = group["lb_endpoints"]
        socket_address = endpoint["endpoint"]["address"]["socket_address"]
        addresses[cluster["name"]] = (socket_address["address"], socket_address["port_value"])
    return addresses


@pytest.mark.parametrize("upstreams", ["local", "network"])
def test_envoy_accepts_it_without_a_warning(upstreams, capfd):
    assert validate(load_config({"USAGI_UPSTREAMS": upstreams}, TABLE), TABLE) == 0
    assert "warning" not in capfd.readouterr().err


KEYS = (make_key("alice", "infer", "one", parse_rate("100/s")), make_key("root", "admin", "two"))


def test_envoy_accepts_keys_and_sees_no_secret():
    config = load_config({}, TABLE)
    for keys in ((), KEYS):
        assert validate(config, TABLE, keys) == 0
    rendered = json.dumps(bootstrap(config, TABLE, KEYS))
    assert digest("one") in rendered
    assert "Bearer one" not in rendered
    (bucket,) = http_filter(bootstrap(config, TABLE, KEYS), "usagi.rates")["descriptors"]
    assert bucket["entries"] == [{"key": "key", "value": "alice"}]
    assert bucket["token_bucket"] == {"max_tokens": 100, "tokens_per_fill": 100, "fill_interval": "1s"}


def test_every_service_has_its_cluster():
    local = {name: ("127.0.0.1", service.local_port) for name, service in TABLE.services.items()}
    network = {name: (name, service.port) for name, service in TABLE.services.items()}
    catalog = {CATALOG: ("127.0.0.1", TABLE.gateway.catalog_port)}
    admin = {"admin": ("127.0.0.1", TABLE.gateway.admin_port)}
    assert endpoints(render()) == local | catalog
    assert endpoints(render(USAGI_UPSTREAMS="network")) == network | catalog | admin


def test_every_service_is_routed_and_transcoded():
    rendered = render()
    typed = {name for service in TABLE.services.values() for name in service.grpc_services}
    assert typed <= set(http_filter(rendered, "grpc_json_transcoder")["services"])
    hosts = connection_manager(rendered)["route_config"]["virtual_hosts"]
    assert {host["name"] for host in hosts} == {*TABLE.services, "any"}
    for host in hosts:
        for name in typed:
            path = f"/{name}/"
            first = next(route for route in host["routes"] if path.startswith(route["match"].get("prefix", "-")))
            assert first["route"]["cluster"] == name.split(".")[1]


def test_no_route_cuts_a_long_call():
    for host in connection_manager(render())["route_config"]["virtual_hosts"]:
        for route in host["routes"]:
            assert route["route"]["timeout"] == "0s"
            assert route["route"]["max_stream_duration"] == {"grpc_timeout_header_max": "0s"}
    assert connection_manager(render())["stream_idle_timeout"] == "0s"


def test_buffers_hold_the_largest_message():
    rendered = render()
    limit = TABLE.gateway.max_message_bytes
    resources = rendered["static_resources"]
    for holder in (resources["listeners"][0], *resources["clusters"]):
        assert holder["per_connection_buffer_limit_bytes"] > limit * 4 / 3  # base64
    assert http_filter(rendered, "body_size_limit")["max_request_bytes"] == limit + 5


def test_admin_methods_are_denied_from_elsewhere():
    rules = http_filter(render(), "usagi.admission")["rules"]
    assert rules["action"] == "DENY"
    policy = rules["policies"]["admin"]
    assert [entry["url_path"]["path"]["exact"] for entry in policy["permissions"]] == list(ADMIN_METHODS)
    allowed = policy["principals"][0]["not_id"]["or_ids"]["ids"]
    assert [entry["direct_remote_ip"]["address_prefix"] for entry in allowed] == ["127.0.0.0", "::1"]


def test_admin_interface_is_on_loopback_only():
    rendered = render(USAGI_GATEWAY_HOST="0.0.0.0")
    assert rendered["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    _, metrics = render(USAGI_METRICS_PORT="9464")["static_resources"]["listeners"]
    (host,) = metrics["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert [route["match"] for route in host["routes"]] == [{"path": "/metrics"}]


def test_reasons_of_refusals_are_distinct():
    kinds = refusals(1)
    assert len({kind.reason for kind in kinds}) == len(kinds)


def test_fields_for_strict_json():
    fields = message_fields(["inference.ModelInferRequest"])
    assert fields["inference.ModelInferRequest"]["modelName"] is True
    assert fields["inference.ModelInferRequest"]["inputs"] == "inference.ModelInferRequest.InferInputTensor"
    assert fields["inference.ModelInferRequest.ParametersEntry"] == {"*": "inference.InferParameter"}


def test_prometheus_configuration_is_in_step():
    committed = (ROOT / "deploy" / "observability" / "prometheus.yml").read_text(encoding="utf-8")
    assert committed == scrape_config(TABLE), "run: python -m services.gateway prometheus"


def test_render_prints_json():
    command = [sys.executable, "-m", "services.gateway", "render"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert json.loads(printed) == render()


def test_configuration_from_the_environment():
    config = load_config({"USAGI_UPSTREAM_VISION": "[::1]:7", "USAGI_GATEWAY_PORT": "81"}, TABLE)
    assert config.addresses["vision"] == Address("::1", 7)
    assert (config.gateway_port, config.admin_port) == (81, TABLE.gateway.admin_port)


def test_all_bad_values_in_one_message():
    environment = {
        "USAGI_GATEWAY_PORT": "many",
        "USAGI_ADMIN_PORT": "few",
        "USAGI_UPSTREAM_ALCHEMY": "host:1",
        "USAGI_UPSTREAM_VISION": "nowhere",
    }
    with pytest.raises(ConfigurationError) as caught:
        load_config(environment, TABLE)
    for variable in environment:
        assert variable in str(caught.value)
    with pytest.raises(ConfigurationError, match="USAGI_UPSTREAMS='moon' is not local or network"):
        load_config({"USAGI_UPSTREAMS": "moon"}, TABLE)


def test_the_catalog_needs_neither_numpy_nor_onnxruntime():
    script = "import sys, services.gateway.supervisor; print({'numpy', 'onnxruntime', 'torch'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True)
    assert printed.stdout == "set()\n"
