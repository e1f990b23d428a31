// Drives a node with the npm package proxmox-api and prints what it saw as JSON.
// Standard input: host, port, user, password, tokenId and tokenSecret, as JSON.
import { readFileSync } from "node:fs";
import proxmoxApi from "proxmox-api";

const given = JSON.parse(readFileSync(0, "utf8"));
const seen = {};

async function ended(node, upid) {
  for (;;) {
    const status = await node.tasks.$(upid).status.$get();
    if (status.status === "stopped") return status.exitstatus;
    await new Promise((resume) => setTimeout(resume, 50));
  }
}

async function reason(call) {
  try {
    await call();
  } catch (error) {
    return error.message;
  }
  return "nothing was refused";
}

const api = proxmoxApi({ host: given.host, port: given.port, username: given.user, password: given.password });
seen.version = await api.version.$get();
const [first] = await api.nodes.$get();
const node = api.nodes.$(first.node);
seen.nextid = await api.cluster.nextid.$get();
const vmid = Number(seen.nextid);
const created = await node.qemu.$post({
  vmid, name: "from-npm", memory: 64, onboot: true, protection: false, tags: "b;a", scsi0: "local-lvm:1",
});
seen.created = await ended(node, created);
const vm = node.qemu.$(vmid);
seen.config = await vm.config.$get();
seen.changed = await vm.config.$put({ onboot: false, description: "gr\u00fc\u00dfe\nzwei" });
seen.pending = await vm.pending.$get();
seen.current = await vm.config.$get({ current: true });
seen.started = await ended(node, await vm.status.start.$post());
if (seen.started !== "OK") throw Error(`start: ${seen.started}`);
seen.running = (await vm.status.current.$get()).status;
seen.refused = await reason(() => vm.$delete());
seen.unknown = await reason(() => vm.config.$put({ nonsense: [1, 2] }));
seen.agent = await reason(() => vm.agent.exec.$post({ command: ["sh", "-c", "echo two words"] }));
seen.stopped = await ended(node, await vm.status.stop.$post({ timeout: 5 }));

const byToken = proxmoxApi({
  host: given.host, port: given.port, tokenID: given.tokenId, tokenSecret: given.tokenSecret,
});
seen.listed = (await byToken.nodes.$(first.node).qemu.$get({ full: true })).map((each) => each.name);
seen.deleted = await ended(node, await byToken.nodes.$(first.node).qemu.$(vmid).$delete({ purge: true }));
seen.wrong = await reason(() =>
  proxmoxApi({ host: given.host, port: given.port, password: "wrong" }).version.$get());
console.log(JSON.stringify(seen));
process.exit(0); // its pool of connections would keep it
