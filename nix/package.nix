{ lib, python3Packages }:

python3Packages.buildPythonApplication {
  pname = "offloadd";
  version = builtins.head (builtins.match ".*__version__ = \"([^\"]+)\".*" (builtins.readFile ../offloadd/__init__.py));
  pyproject = true;
  src = lib.cleanSource ../.;

  build-system = [ python3Packages.setuptools ];
  # The names in setup.cfg; a test compares them. nixpkgs' own versions are taken.
  pythonRelaxDeps = true;
  dependencies = with python3Packages; [
    aiohttp
    httptools
    msgspec
    multidict
    nvidia-ml-py
    peewee
    prometheus-client
    psutil
    pydantic
    pyyaml
    rich
    typer
    uvloop
    watchfiles
    yarl
  ];

  # The project's own tests need the network and a real llama-server.
  doCheck = false;
  pythonImportsCheck = [ "offloadd.daemon" "offloadd.ctl" ];

  postInstall = ''
    install -Dm644 systemd/offloadd.catalog $out/lib/systemd/catalog/offloadd.catalog
  '';

  meta = {
    description = "One daemon that owns the LLM server processes of a GPU machine";
    license = lib.licenses.asl20;
    mainProgram = "offloadd";
    platforms = lib.platforms.linux;
  };
}
