# Options to the config's JSON: pure, so that it can be evaluated anywhere.
{ lib }:

let
  inherit (lib) types;

  valueType = types.nullOr (types.oneOf [ types.bool types.int types.float types.str types.path (types.attrsOf valueType) (types.listOf valueType) ])
    // { description = "JSON value"; };

  # The programs of the built-in engines; any other package's is the one that it names as its main one.
  programs = {
    llamacpp = package: [ "${package}/bin/llama-server" ];
    vllm = package: [ "${package}/bin/vllm" "serve" ];
    tgi = package: [ "${package}/bin/text-generation-launcher" ];
  };
  isBuiltin = name: programs ? ${name};
  isAddress = endpoint: endpoint != null && builtins.match "https?://.*" endpoint != null;

  known = [ "name" "package" "command" "models" "healthCheck" "inference" "_module" ];
  drop = lib.filterAttrsRecursive (_: value: value != null);

  command = backend:
    if backend.command != null then backend.command
    else if backend.package == null then null
    else (programs.${backend.name} or (package: [ (lib.getExe package) ])) backend.package;

  external = backend: isAddress backend.inference.endpoint && command backend == null;

  kind = backend: if isBuiltin backend.name then null else if external backend then "external" else "custom";

  inference = backend: { path = backend.inference.endpoint; inherit (backend.inference) format; };

  health = backend:
    if backend.healthCheck == null || kind backend != "custom" then null
    else { inherit (backend.healthCheck) path; ready_status = backend.healthCheck.readyStatus; };

  section = backend: removeAttrs backend known // drop ({
    kind = kind backend;
    command = command backend;
    url = if external backend then backend.inference.endpoint else null;
    health = health backend;
  } // lib.optionalAttrs (drop (inference backend) != { } && kind backend == "custom") { inference = inference backend; });

  # A model that several engines serve has them all, each with its own source.
  modelsOf = backend: lib.mapAttrsToList (model: source: { inherit model source; engine = backend.name; }) backend.models;
  modelsFrom = backends:
    let served = lib.groupBy (one: one.model) (lib.concatMap modelsOf (lib.attrValues backends));
    in lib.mapAttrs
      (_: ones: {
        source = (lib.head ones).source;
        backends = map (one: one.engine) ones;
      } // lib.optionalAttrs (lib.length ones > 1) {
        sources = lib.listToAttrs (map (one: lib.nameValuePair one.engine one.source) ones);
      })
      served;

  render = cfg:
    let
      settings = removeAttrs cfg.settings [ "_module" ];
      sections = lib.mapAttrs' (_: backend: lib.nameValuePair backend.name (section backend)) cfg.backends;
      made = { backends = sections; models = modelsFrom cfg.backends; };
    in
    lib.recursiveUpdate (lib.filterAttrs (_: value: value != { }) made) settings;
in
{
  __functor = _: render;
  inherit valueType external;
  isName = name: builtins.match "[a-z][a-z0-9_-]{0,31}" name != null;
  # The port of an address that others than this machine reach; null for the rest.
  openPort = address:
    let
      found = builtins.match ".*:([0-9]+)" address;
      mine = lib.any (prefix: lib.hasPrefix prefix address) [ "unix:" "127." "[::1]:" "localhost:" ];
    in if mine || found == null then null else lib.toInt (lib.head found);
}
