"""TLS at the public listener, and the certificates that `usagi tls make` makes for it.

With a certificate, callers from elsewhere must speak TLS. Those on the machine itself may, and need not: the catalog
and the container's health check, which cannot afford a handshake every 3 s, come over loopback.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError, InvalidInput

LOCAL_FOLDER = "var/tls"
CERTIFICATE, AUTHORITY = "server.pem", "ca.crt"
"""The server's key and certificate in one file, so that it is replaced in one step; what clients trust."""
NAMES = ("localhost", "127.0.0.1", "::1", "gateway")
DAYS = 397
RENEW_DAYS = 30
SECRET = "server"  # noqa: S105  a name
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")

Json = dict[str, Any]


def filter_chains(filters: list[Json], certificate: str, key: str) -> Json:
    """The listener's fields: its filters behind TLS, and without it for callers on this machine.

    Args:
        filters: of the network.
        certificate: path of the certificate's chain as PEM; empty for no TLS.
        key: path of its key.
    """
    if not certificate:
        return {"filter_chains": [{"filters": filters}]}
    loopback = [{"address_prefix": "127.0.0.0", "prefix_len": 8}, {"address_prefix": "::1", "prefix_len": 128}]
    plain = {"transport_protocol": "raw_buffer", "direct_source_prefix_ranges": loopback}
    inspector = _typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")
    return {
        "listener_filters": [{"name": "envoy.filters.listener.tls_inspector", "typed_config": inspector}],
        "filter_chains": [
            {
                "filter_chain_match": {"transport_protocol": "tls"},
                "transport_socket": _transport_socket(certificate, key),
                "filters": filters,
            },
            {"filter_chain_match": plain, "filters": filters},
        ],
    }


def _transport_socket(certificate: str, key: str) -> Json:
    pair = {"certificate_chain": {"filename": certificate}, "private_key": {"filename": key or certificate}}
    context = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificates": [pair],
    }
    kind = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    return {"name": "envoy.transport_sockets.tls", "typed_config": _typed(kind, common_tls_context=context)}


def watched(bootstrap: Json, folder: Path) -> Json:
    """The bootstrap with its certificate in a file that Envoy watches, so that a renewed one counts at once.

    Args:
        bootstrap: of Envoy; the one certificate in it is moved.
        folder: for the file that names the certificate's; Envoy looks at those again when they are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for listener in bootstrap["static_resources"]["listeners"]:
        for chain in listener["filter_chains"]:
            if "transport_socket" not in chain:
                continue
            context = chain["transport_socket"]["typed_config"]["common_tls_context"]
            (pair,) = context.pop("tls_certificates")
            place = str(Path(pair["certificate_chain"]["filename"]).absolute().parent)
            secret = {"name": SECRET, "tls_certificate": {**pair, "watched_directory": {"path": place}}}
            path = folder / "tls.json"
            path.write_text(_discovery_response(secret), encoding="utf-8")
            source = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
            context["tls_certificate_sds_secret_configs"] = [{"name": SECRET, "sds_config": source}]
    return bootstrap


def _discovery_response(secret: Json) -> str:
    return json.dumps({"resources": [_typed("envoy.extensions.transport_sockets.tls.v3.Secret", **secret)]})


def make_certificate(folder: Path, names: Sequence[str] = (), days: int = DAYS) -> Path:
    """Makes an authority and a certificate signed by it; the authority's key is not kept, so it signs nothing else.

    Args:
        folder: gets `server.pem` and `ca.crt`, the first readable by its owner only.
        names: host names and addresses of the gateway besides NAMES.
        days: how long both hold.

    Returns:
        The path of `server.pem`.

    Raises:
        InvalidInput: a name is none.
        ConfigurationError: openssl is missing or fails, or the folder cannot be written.
    """
    alternatives = ",".join(_alternative(name) for name in dict.fromkeys((*NAMES, *names)))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
            return _make(Path(made), folder, alternatives, days)
    except OSError as error:
        raise ConfigurationError(f"no certificate can be written into {folder}: {error.strerror}") from error


def holds_long_enough(certificate: Path) -> bool:
    """Whether the certificate is there and holds for RENEW_DAYS more.

    Raises:
        ConfigurationError: there is no openssl.
    """
    if not certificate.exists():
        return False
    return not _run_openssl("x509", "-in", certificate, "-noout", "-checkend", RENEW_DAYS * 86400).returncode


def _make(made: Path, folder: Path, alternatives: str, days: int) -> Path:
    authority, key, request, signed = (made / name for name in ("ca.crt", "server.key", "server.csr", "server.crt"))
    authority_key = made / "ca.key"
    _openssl(
        *("req", "-x509", *CURVE, "-keyout", authority_key, "-out", authority, "-days", days),
        *("-subj", "/CN=Usagi development CA", "-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl(
        *("req", "-new", *CURVE, "-keyout", key, "-out", request, "-subj", "/CN=usagi"),
        *("-addext", f"subjectAltName={alternatives}", "-addext", "extendedKeyUsage=serverAuth"),
        *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=critical,digitalSignature"),
    )
    _openssl(
        *("x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key, "-out", signed, "-days", days),
        *("-copy_extensions", "copyall"),
    )
    both = made / CERTIFICATE
    with os.fdopen(os.open(both, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.read_bytes() + signed.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    authority.chmod(0o644)
    authority.replace(folder / AUTHORITY)
    return both.replace(folder / CERTIFICATE)


def _alternative(name: str) -> str:
    with contextlib.suppress(ValueError):
        return f"IP:{ipaddress.ip_address(name)}"
    if not name or not all(part.replace("-", "").isalnum() for part in name.removeprefix("*.").split(".")):
        raise InvalidInput("name", f"is {name!r}, expected a host name or an address")
    return f"DNS:{name}"


def _openssl(*arguments: object) -> None:
    done = _run_openssl(*arguments)
    if done.returncode:
        raise ConfigurationError(f"openssl {arguments[0]} fails: {done.stderr.strip()[-400:]}")


def _run_openssl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["openssl", *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  no shell
    except FileNotFoundError as error:
        raise ConfigurationError(
            "there is no openssl command: install it, or name a certificate of your own with USAGI_TLS_CERT"
        ) from error


def _typed(kind: str, /, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/{kind}", **fields}
