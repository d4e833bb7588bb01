# A whole machine: the daemon serves, and a switch to other settings reloads it and kills no model.
{ pkgs }:

let
  # A server with one model of no weight: what is tested is the module, not an engine.
  engine = pkgs.writers.writePython3Bin "small-engine" { } ''
    import json
    import sys
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.answer({"status": "ok", "object": "list", "data": []})

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said = {"role": "assistant", "content": "from the machine"}
            choice = {"index": 0, "finish_reason": "stop", "message": said}
            self.answer({"object": "chat.completion", "choices": [choice]})


    port = int(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
  '';
in
pkgs.testers.runNixOSTest {
  name = "offloadd";

  nodes.machine = { lib, ... }: {
    imports = [ ./module.nix ];
    virtualisation.memorySize = 2048;
    environment.systemPackages = [ pkgs.curl pkgs.jq ];
    kernelcore.ml.offload = {
      enable = true;
      backends.small = {
        command = [ "${engine}/bin/small-engine" "\${port}" ];
        models = [ "tiny" ];
        healthCheck = "/health";
      };
      settings.models.tiny = { run = "always"; vram = "64MiB"; aliases = [ "default" ]; };
      checkConfig = true;
    };
    specialisation.changed.configuration.kernelcore.ml.offload.settings.models.tiny.aliases = lib.mkForce [ "default" "another-name" ];
  };

  testScript = ''
    import json

    CHAT = "curl -sf http://127.0.0.1:9000/v1/chat/completions -d '{\"model\": \"%s\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}'"

    machine.wait_for_unit("ml-offload-api.service")
    machine.wait_until_succeeds("curl -sf http://127.0.0.1:9000/models/tiny | jq -e '.offloadd.state == \"ready\"'")
    assert "from the machine" in machine.succeed(CHAT % "default")
    assert "1 of 1 model ready" in machine.succeed("systemctl show ml-offload-api -p StatusText")
    before = json.loads(machine.succeed("curl -sf http://127.0.0.1:9000/models/tiny"))["offloadd"]["instances"][0]["pid"]
    main = machine.succeed("systemctl show ml-offload-api --value -p MainPID")

    machine.succeed("/run/current-system/specialisation/changed/bin/switch-to-configuration test")
    machine.wait_until_succeeds(CHAT % "another-name")
    after = json.loads(machine.succeed("curl -sf http://127.0.0.1:9000/models/tiny"))["offloadd"]["instances"][0]["pid"]
    assert (before, main) == (after, machine.succeed("systemctl show ml-offload-api --value -p MainPID")), "the switch restarted something"

    machine.succeed("systemctl kill -s KILL --kill-whom=main ml-offload-api")
    machine.succeed(CHAT % "default")  # waits for the next daemon
    adopted = json.loads(machine.succeed("curl -sf http://127.0.0.1:9000/models/tiny"))["offloadd"]["instances"][0]["pid"]
    assert adopted == before, "the server did not outlive the daemon"

    machine.succeed("systemctl stop ml-offload-api.socket ml-offload-api.service")
    machine.fail("pgrep -f small-engine")
  '';
}
