"""The bill of materials of a wheel: CycloneDX JSON, checked against its schema.

What is inside the wheel besides mmfast itself is the static CUDA runtime, where there are CUDA
kernels. torch is needed and not inside; the tools are those that made the library.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

CUDA_LICENSE = "NVIDIA Software License Agreement and CUDA Supplement"
CUDA_LICENSE_URL = "https://docs.nvidia.com/cuda/eula/index.html"


def write_sbom(
    target: Path,
    wheel_name: str,
    sha256: str,
    version: str,
    epoch: int,
    requirements: list[str],
    tools: Mapping[str, str],
    cudart: str | None,
) -> None:
    """Writes `target`. `cudart` is the version of the CUDA runtime inside, None without it.

    The same input gives the same bytes. Raises ValueError if the schema objects.
    """
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{wheel_name}#{sha256}"))
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, tz=timezone.utc)
    own = Component(
        name="mmfast",
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"mmfast@{version}",
        purl=PackageURL("pypi", None, "mmfast", version, {"file_name": wheel_name}),
        licenses=[LicenseExpression("Apache-2.0")],
        hashes=[HashType.from_composite_str(f"sha256:{sha256}")],
    )
    bom.metadata.component = own
    for name, tool_version in sorted(tools.items()):
        bom.metadata.tools.components.add(
            Component(name=name, version=tool_version, type=ComponentType.APPLICATION, bom_ref=name)
        )
    inside = []
    if cudart is not None:
        inside.append(
            Component(
                name="cudart_static",
                version=cudart,
                description="NVIDIA CUDA runtime, linked into mmfast/_C.so",
                type=ComponentType.LIBRARY,
                bom_ref=f"cudart_static@{cudart}",
                licenses=[DisjunctiveLicense(name=CUDA_LICENSE)],
                external_references=[
                    ExternalReference(
                        type=ExternalReferenceType.LICENSE, url=XsUri(CUDA_LICENSE_URL)
                    )
                ],
            )
        )
    needed = [
        Component(
            name=requirement.name,
            description="needed where the wheel is installed, not inside it",
            type=ComponentType.LIBRARY,
            scope=ComponentScope.REQUIRED,
            bom_ref=f"needed:{requirement.name}",
            purl=PackageURL("pypi", None, requirement.name),
            properties=[Property(name="mmfast:versions", value=str(requirement.specifier))],
        )
        for requirement in map(Requirement, requirements)
    ]
    for component in (*inside, *needed):
        bom.components.add(component)
    bom.register_dependency(own, [*inside, *needed])
    text = JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise ValueError(f"the bill of materials is not valid CycloneDX 1.6: {wrong}")
    target.write_text(text, encoding="utf-8")
