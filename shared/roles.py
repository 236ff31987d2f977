"""Who may call what: every method needs the role infer, those named here need admin.

The one declaration of the administrative methods. The gateway's rules are rendered from it, and every server asks it
when a handler is registered, so that no servicer can forget to. Standard library only.
"""

from __future__ import annotations

INFER = "infer"
ADMIN = "admin"
ROLES = (INFER, ADMIN)
"""Each may do what those before it may."""

ADMIN_METHODS = (
    "/usagi.model.v1.ModelService/LoadModel",
    "/usagi.model.v1.ModelService/UnloadModel",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
)
"""They change what a server does for everybody."""

NEEDS_ADMIN = (
    "this method needs a key with the role admin; where no keys are set, it is open to callers on the same machine only"
)
