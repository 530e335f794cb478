// A client in another language, from docs/protocol.md alone: it needs Node, and nothing that is to be installed.
//
//     node examples/client.mjs /run/user/1000/async_cache.sock
//     node examples/client.mjs 127.0.0.1:7000 TOKEN
//
// It stores a prompt, asks for a longer one, waits for both answers, and reads what it has stored.
import assert from "node:assert/strict";
import net from "node:net";

// MessagePack, as far as the protocol has it: numbers, texts, bytes, booleans, nil, arrays, maps.

const head = (kind, size, bytes) => {
  const made = Buffer.alloc(1 + bytes);
  made[0] = kind;
  if (bytes === 8) made.writeBigInt64BE(BigInt(size), 1);
  else if (bytes) made.writeUIntBE(size, 1, bytes);
  return made;
};

function sized(size, fixed, limit, [one, two, four]) {
  if (fixed !== null && size < limit) return head(fixed | size, 0, 0);
  if (size < 256 && one) return head(one, size, 1);
  return size < 65536 ? head(two, size, 2) : head(four, size, 4);
}

export function pack(value) {
  if (value === null || value === undefined) return Buffer.from([0xc0]);
  if (typeof value === "boolean") return Buffer.from([value ? 0xc3 : 0xc2]);
  if (typeof value === "number") {
    if (!Number.isInteger(value)) {
      const made = Buffer.alloc(9);
      made[0] = 0xcb;
      made.writeDoubleBE(value, 1);
      return made;
    }
    return value >= 0 && value < 128 ? Buffer.from([value]) : head(0xd3, value, 8);
  }
  if (typeof value === "string") {
    const text = Buffer.from(value);
    return Buffer.concat([sized(text.length, 0xa0, 32, [0xd9, 0xda, 0xdb]), text]);
  }
  if (value instanceof Uint8Array) return Buffer.concat([sized(value.length, null, 0, [0xc4, 0xc5, 0xc6]), value]);
  return Buffer.concat([sized(value.length, 0x90, 16, [0, 0xdc, 0xdd]), ...value.map(pack)]);
}

export function unpack(data) {
  let at = 0;
  const take = size => data.subarray(at, (at += size));
  const number = size => take(size).readUIntBE(0, size);
  const array = size => Array.from({ length: size }, next);
  const map = size => Object.fromEntries(Array.from({ length: size }, () => [next(), next()]));
  function next() {
    const kind = number(1);
    if (kind < 0x80) return kind;
    if (kind < 0x90) return map(kind & 15);
    if (kind < 0xa0) return array(kind & 15);
    if (kind < 0xc0) return take(kind & 31).toString();
    if (kind >= 0xe0) return kind - 256;
    switch (kind) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return Buffer.from(take(number(1 << (kind - 0xc4))));
      case 0xca: return take(4).readFloatBE();
      case 0xcb: return take(8).readDoubleBE();
      case 0xcc: case 0xcd: case 0xce: return number(1 << (kind - 0xcc));
      case 0xcf: return Number(take(8).readBigUInt64BE());
      case 0xd0: return take(1).readInt8();
      case 0xd1: return take(2).readInt16BE();
      case 0xd2: return take(4).readInt32BE();
      case 0xd3: return Number(take(8).readBigInt64BE());
      case 0xd9: case 0xda: case 0xdb: return take(number(1 << (kind - 0xd9))).toString();
      case 0xdc: case 0xdd: return array(number(kind === 0xdc ? 2 : 4));
      case 0xde: case 0xdf: return map(number(kind === 0xde ? 2 : 4));
      default: throw new Error(`no MessagePack: ${kind}`);
    }
  }
  return next();
}

// Values travel as arrays of their fields.
const named = (names, fields) => Object.fromEntries(names.map((name, n) => [name, fields[n]]));
const HITS = ["requestId", "startChunk", "chunks", "tokens", "l1Chunks", "l2Chunks", "foundChunks", "shortfall"];
const RESULT = ["requestId", "startChunk", "chunks", "tokens", "l1Chunks", "l2Chunks", "shortfall", "seconds"];
const MOST_DATA = 262144;   // of a StoreData

export class Client {
  #socket; #received = Buffer.alloc(0); #number = 0; #layouts = 0; #waiting = new Map(); #greeted; #lost = null;

  // Where it is: the path of a Unix socket, or host:port.
  static async connect(where, { token = null, namespace = "" } = {}) {
    const client = new Client();
    const [host, port] = where.startsWith("/") ? [] : where.split(/:(?=\d+$)/);
    client.#socket = host ? net.connect(Number(port), host) : net.connect(where);
    const welcome = new Promise((resolve, reject) => { client.#greeted = { resolve, reject }; });
    client.#socket.on("data", data => client.#heard(data));
    client.#socket.on("error", error => client.#end(error));
    client.#socket.on("close", () => client.#end(new Error("the connection is closed")));
    client.#send(["Hello", 1, token, namespace, false]);   // no descriptor can come to us: bytes come in frames
    await welcome;
    return client;
  }

  close() { this.#socket.end(); }

  #send(message) {
    const payload = pack(message), length = Buffer.alloc(4);
    length.writeUInt32LE(payload.length);
    this.#socket.write(Buffer.concat([length, payload]));
  }

  #heard(data) {
    this.#received = Buffer.concat([this.#received, data]);
    while (this.#received.length >= 4) {
      const end = 4 + this.#received.readUInt32LE();
      if (this.#received.length < end) return;
      const [name, number, ...fields] = unpack(this.#received.subarray(4, end));
      this.#received = this.#received.subarray(end);
      if (name === "Welcome") this.#greeted.resolve();
      else if (name === "Failed" && number === 0) this.#end(new Error(fields.join(": ")));
      else this.#waiting.get(number)?.(name, fields);
    }
  }

  #end(error) {
    this.#lost ??= error;
    this.#greeted.reject(this.#lost);
    for (const told of this.#waiting.values()) told("Failed", ["connection", this.#lost.message]);
    this.#waiting.clear();
  }

  // Send a message, and be told all that comes for its number, until `told` returns true.
  #ask(name, fields, told) {
    const number = ++this.#number;
    this.#waiting.set(number, (kind, values) => { if (told(kind, values)) this.#waiting.delete(number); });
    this.#send([name, number, ...fields]);
    return number;
  }

  #answer(name, fields) {
    return new Promise((resolve, reject) => this.#ask(name, fields, (kind, values) => {
      if (kind === "Failed") reject(new Error(values.join(": ")));
      else resolve(values);
      return true;
    }));
  }

  async ping() { await this.#answer("Ping", []); }

  // groups: [{shape, dtype}]. One rank, one reader.
  async layout(model, groups, chunkTokens) {
    const number = this.#layouts++;
    const described = groups.map(({ shape, dtype }) => ["Group", shape, dtype, null, null]);
    await this.#answer("RegisterLayout", [number, ["Layout", model, described, chunkTokens, 1, 1, ""]]);
    return { number, chunkTokens };
  }

  // A prompt by the ids of its whole chunks.
  prompt(layout, tokens, salt = "") {
    const whole = tokens.slice(0, tokens.length - tokens.length % layout.chunkTokens), ids = Buffer.alloc(4 * whole.length);
    whole.forEach((id, n) => ids.writeUInt32LE(id, 4 * n));
    return ["TokenIds", layout.number, salt, "", ids, []];
  }

  // Two promises, and a third for the end of the request.
  prefetch(prompt, requestId) {
    const resolve = {}, reject = {};
    const promise = name => new Promise((yes, no) => { resolve[name] = yes; reject[name] = no; });
    const made = { requestId, lookupDone: promise("hits"), loadDone: promise("result"), over: promise("over") };
    for (const it of [made.lookupDone, made.loadDone, made.over]) it.catch(() => {});   // who waits for it is told
    this.#ask("Prefetch", [prompt, requestId], (kind, [value, message]) => {
      if (kind === "LookupDone") resolve.hits(named(HITS, value));
      if (kind === "LoadDone") resolve.result(named(RESULT, value));
      if (kind === "RequestOver") resolve.over();
      if (kind === "Failed") Object.values(reject).forEach(no => no(new Error(`${value}: ${message}`)));
      return kind === "RequestOver" || kind === "Failed";
    });
    return made;
  }

  async endRequest(requestId) { await this.#answer("EndRequest", [requestId]); }

  // The bytes of each chunk that was loaded: `size` of them from where its block begins.
  async read(requestId, size) {
    let buffer = null, missing = 0, offsets = [], number;
    await new Promise((resolve, reject) => {
      number = this.#ask("AcquireRead", [requestId], (kind, fields) => {
        if (kind === "Failed") { reject(new Error(fields.join(": "))); return true; }
        if (kind === "ReadAcquired") {
          offsets = fields[2];
          missing = fields[4] ?? 0;
          buffer = Buffer.alloc(missing);
        } else if (kind === "ReadData") {
          fields[1].copy(buffer, fields[0]);
          missing -= fields[1].length;
        }
        if (!missing) resolve();
        return !missing;
      });
    });
    await this.#answer("ReleaseRead", [number]);
    return offsets.map(offset => offset === null ? null : buffer.subarray(offset, offset + size));
  }

  // Fill what the server lacks of a prompt: `fill` gives the bytes of a chunk's block. How many were stored.
  async store(prompt, fill) {
    let chunks, number;
    await new Promise((resolve, reject) => {
      number = this.#ask("ReserveStore", [prompt], (kind, fields) => {
        if (kind === "Failed") { reject(new Error(fields.join(": "))); return true; }
        if (kind === "StoreReserved") { chunks = fields[0]; resolve(); }
        return kind === "StoreClosed";
      });
    });
    for (const [position, chunk] of chunks.entries()) {
      const block = fill(chunk);
      for (let at = 0; at < block.length; at += MOST_DATA)
        this.#send(["StoreData", number, position, at, block.subarray(at, at + MOST_DATA)]);
      await this.#answer("CommitStore", [number, position]);
    }
    await this.#answer("CloseStore", [number]);
    this.#waiting.delete(number);
    return chunks.length;
  }
}

async function main([where, token = null]) {
  const client = await Client.connect(where, { token, namespace: "node" });
  await client.ping();
  const layout = await client.layout("example", [{ shape: [300000], dtype: "uint8" }], 4);
  const tokens = Array.from({ length: 20 }, (_, n) => n), block = chunk => Buffer.alloc(300000, chunk + 1);
  const stored = await client.store(client.prompt(layout, tokens.slice(0, 12)), block);
  const prefetch = client.prefetch(client.prompt(layout, tokens), "node-1");
  const hits = await prefetch.lookupDone;
  const result = await prefetch.loadDone;
  const read = await client.read("node-1", 300000);
  read.forEach((bytes, chunk) => assert.deepEqual(bytes, block(chunk)));
  await prefetch.over;   // the only reader has left
  console.log(JSON.stringify({ stored, hits: hits.chunks, loaded: result.chunks, read: read.length }));
  client.close();
}

if (process.argv[1] === new URL(import.meta.url).pathname) await main(process.argv.slice(2));
