# The module evaluated without NixOS: options that it sets are taken as they come, packages are names, files are their texts.
{ nixpkgsLib, machine }:

let
  lib = import nixpkgsLib;
  anything = lib.mkOption { type = lib.types.attrsOf lib.types.anything; default = { }; };
  package = name: mainProgram: { type = "derivation"; outPath = "/nix/store/${name}"; name = name; meta.mainProgram = mainProgram; };
  pkgs = {
    callPackage = _: _: package "offloadd" "offloadd";
    writeText = _: text: text;
    runCommand = _: _: script: script;
    llama-cpp = package "llama-cpp" "llama-server";
    vllm = package "vllm" "vllm";
    text-generation-inference = package "tgi" "text-generation-launcher";
    util-linux = package "util-linux" "setpriv";
    whisper-cpp = package "whisper-cpp" "whisper-server";
  };
  stubs = {
    options = {
      assertions = lib.mkOption { type = lib.types.listOf lib.types.anything; default = [ ]; };
      environment.etc = anything;
      environment.systemPackages = lib.mkOption { type = lib.types.listOf lib.types.anything; default = [ ]; };
      networking.firewall.allowedTCPPorts = lib.mkOption { type = lib.types.listOf lib.types.int; default = [ ]; };
      systemd.services = anything;
      systemd.sockets = anything;
      systemd.tmpfiles.rules = lib.mkOption { type = lib.types.listOf lib.types.str; default = [ ]; };
      users.users = anything;
      users.groups = anything;
    };
    config._module.args.pkgs = pkgs;
  };
  made = (lib.evalModules { modules = [ ../../nix/module.nix stubs (import machine) ]; }).config;
in
{
  file = made.environment.etc."offloadd/offloadd.json".source or null;
  failed = map (one: one.message) (lib.filter (one: !one.assertion) made.assertions);
  inherit (made.systemd) services sockets;
  rules = made.systemd.tmpfiles.rules;
  users = made.users.users;
  groups = made.users.groups;
  ports = made.networking.firewall.allowedTCPPorts;
  seen = made.services.offloadd.enable;
}
