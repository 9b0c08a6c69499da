"""Zuul's own component registry, as it runs in every Zuul program.

    components.py ZUUL_CONF [MODEL_API]

With MODEL_API it acts as a program of the Zuul version with that data model, not of the installed one.
It prints the whole registry, as Zuul's objects hold it, at every change:
{"model_api": N, "minimum": N, "own": N, "components": {KIND: {NODE: {ATTRIBUTE: VALUE}}}}, where
own is the program's own data model, which counts like a component's. Commands:

    register KIND HOSTNAME MODEL_API   registers a component of Zuul's own class
    unregister HOSTNAME                removes it
"""

import sys

import zuul.zk.components
from zuul.zk.components import COMPONENT_REGISTRY, ComponentRegistry

import lines


def attributes(component):
    """Returns every attribute of a component, read as Zuul does."""
    return {name: getattr(component, name) for name in component.content}


def main():
    if len(sys.argv) > 2:
        zuul.zk.components.MODEL_API = int(sys.argv[2])
    _, client = lines.connect(sys.argv[1])
    registry = COMPONENT_REGISTRY.create(client)
    own = {}

    def show():
        lines.say(
            model_api=registry.model_api,
            minimum=registry.getMinimumModelApi(),
            own=zuul.zk.components.MODEL_API,
            components={
                kind: {c.path.rsplit('/', 1)[1]: attributes(c) for c in components}
                for kind, components in registry.all()})

    def register(kind, hostname, model_api):
        component = ComponentRegistry.COMPONENT_CLASSES[kind](client, hostname, version='14.3.0')
        component.register(model_api=int(model_api))
        component.state = component.RUNNING
        own[hostname] = component
        return component.path

    def unregister(hostname):
        client.client.delete(own.pop(hostname).path)

    registry.registerCallback(show)
    show()
    lines.serve({'register': register, 'unregister': unregister})


main()
