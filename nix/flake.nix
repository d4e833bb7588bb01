{
  description = "offloadd: one daemon that owns the LLM server processes of a GPU machine";

  inputs.nixpkgs.url = "nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      eachSystem = make: nixpkgs.lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
    in
    {
      packages = eachSystem (pkgs: rec {
        offloadd = pkgs.callPackage ./package.nix { };
        default = offloadd;
      });
      overlays.default = final: _: { offloadd = final.callPackage ./package.nix { }; };
      nixosModules = rec {
        offloadd = import ./module.nix;
        default = offloadd;
      };
      checks = eachSystem (pkgs: {
        package = pkgs.callPackage ./package.nix { };
        vm = import ./vm-test.nix { inherit pkgs; };
      });
    };
}
