/**
 * The client in Node: against a server of a few lines that misbehaves as told, and against a real one.
 *
 * tests/unit/test_js_client.py runs it with a server at REMOTE_VAE_URL and what Python makes of the same in REMOTE_VAE_EXPECTED;
 * without them what needs those is skipped.
 */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import test from "node:test";

import {
  RemoteVAE, RemoteVAEError, Tensor, bfloat16ToFloat32, float16ToFloat32, float32ToBfloat16, float32ToFloat16, listModels,
} from "../remote_vae.js";

const { REMOTE_VAE_URL: url, REMOTE_VAE_EXPECTED: folder } = process.env;
const real = { skip: url && folder ? false : "no server: run tests/unit/test_js_client.py" };
const read = (name) => new Uint8Array(readFileSync(join(folder, name))); // a copy, which begins where a number may
const floats = (name) => new Float32Array(read(name).buffer);
const bytesOf = async (blob) => new Uint8Array(await blob.arrayBuffer());
const LATENTS = new Tensor(new Float32Array(4), [1, 4, 1, 1]);

/** Runs with the URL of a server that answers the requests in turn as `answers` say, the last one ever after. */
async function scripted(answers, run) {
  const seen = [];
  const server = createServer((request, response) => {
    request.resume();
    request.on("end", () => {
      const answer = answers[Math.min(seen.length, answers.length - 1)];
      seen.push({ method: request.method, url: request.url, headers: request.headers, at: performance.now() });
      answer(response);
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await run(`http://127.0.0.1:${server.address().port}/sd`, seen);
  } finally {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

const says = (status, fields, headers = {}) => (response) => {
  response.writeHead(status, headers);
  response.end(typeof fields === "string" ? fields : JSON.stringify(fields));
};
const full = (seconds) => says(503, { error: "Full.", code: "overloaded" }, { "retry-after": String(seconds) });
const busy = full(1);
const well = says(200, "picture", { "content-type": "image/png" });

test("a reply of another kind than was asked for, and a seed that is none, are told", () =>
  scripted([well], async (endpoint) => {
    const vae = new RemoteVAE(endpoint);
    await assert.rejects(vae.decode(LATENTS, { outputType: "pt" }), { type: "broken_reply" });
    await assert.rejects(vae.encode(new Uint8Array(3)), { type: "broken_reply" });
    for (const seed of [-1, 2n ** 63n, 0.5]) await assert.rejects(vae.decode(LATENTS, { seed }), { parameter: "seed" });
    assert.equal(new RemoteVAE("http://:50%off@127.0.0.1/sd") instanceof RemoteVAE, true);
    assert.throws(() => new Tensor(new Float32Array(1), [1], "constructor"), { parameter: "dtype" });
  }));

test("every float16 and bfloat16 becomes the number it is and comes back", () => {
  const all = Uint16Array.from({ length: 65536 }, (_, bits) => bits);
  const isNumber = (bits, exponent) => (bits & exponent) !== exponent || (bits & (exponent ^ 0x7fff)) === 0;
  const halves = all.filter((bits) => isNumber(bits, 0x7c00));
  assert.deepEqual(float32ToFloat16(float16ToFloat32(halves)), halves);
  const brains = all.filter((bits) => isNumber(bits, 0x7f80));
  assert.deepEqual(float32ToBfloat16(bfloat16ToFloat32(brains)), brains);
  assert.deepEqual([...float16ToFloat32([0x3c00, 0x0001, 0x7bff, 0xfc00])], [1, 2 ** -24, 65504, -Infinity]);
  assert.ok([float16ToFloat32([0x7e00])[0], float16ToFloat32(float32ToFloat16([NaN]))[0]].every(Number.isNaN));
  assert.ok(Number.isNaN(bfloat16ToFloat32(float32ToBfloat16([NaN]))[0]));
});

test("numbers are rounded as numpy and torch round them", real, () => {
  const bits = (name) => new Uint16Array(read(name).buffer);
  assert.deepEqual(float32ToFloat16(floats("numbers.f32")), bits("numbers.f16"));
  assert.deepEqual(float32ToBfloat16(floats("numbers.f32")), bits("numbers.bf16"));
});

test("a tensor that does not fit is refused by name", () => {
  const refused = (make, parameter) => assert.throws(make, { name: "RemoteVAEError", type: "bad_request", parameter });
  refused(() => new Tensor(new Float32Array(3), [2]), "shape");
  refused(() => new Tensor(new Float32Array(3), [3, 0.5]), "shape");
  refused(() => new Tensor(new Float32Array(3), "3"), "shape");
  refused(() => new Tensor(new Uint16Array(3), [3]), "dtype");
  refused(() => new Tensor(new Float32Array(3), [3], "float64"), "dtype");
  refused(() => new Tensor(new Float32Array(3), [3], "float16"), "data");
  refused(() => Tensor.fromFloat32([1], [1], "uint8"), "dtype");
});

test("arguments that cannot be meant are refused by name", async () => {
  for (const endpoint of ["sd-v1", "ftp://host/sd", ""]) assert.throws(() => new RemoteVAE(endpoint), { parameter: "endpoint" });
  for (const [name, value] of [["timeoutMs", 0], ["deadlineMs", NaN], ["retries", 1.5], ["token", ""], ["tokn", "x"]]) {
    assert.throws(() => new RemoteVAE("http://127.0.0.1/sd", { [name]: value }), { type: "bad_request", parameter: name });
  }
  const vae = new RemoteVAE("http://127.0.0.1:1/sd");
  await assert.rejects(vae.decode(LATENTS, { imageFormt: "png" }), { type: "bad_request", parameter: "imageFormt" });
  await assert.rejects(vae.decode(LATENTS, { seed: 2 ** 53 }), { type: "bad_request", parameter: "seed" });
  await assert.rejects(vae.decode({}), { type: "bad_request" });
  await assert.rejects(vae.encode("picture.png"), { type: "bad_request", parameter: "image" });
});

test("a busy server is asked again after the time it says", async () => {
  await scripted([busy, busy, well], async (at, seen) => {
    const picture = await new RemoteVAE(at).decode(LATENTS);
    assert.deepEqual([picture.type, await picture.text()], ["image/png", "picture"]);
    assert.equal(seen.length, 3);
    assert.ok(seen[1].at - seen[0].at > 990);
  });
});

test("an error that time will not mend is thrown at once, with all that the server says", async () => {
  const wrong = says(400, { error: "shape is wrong", code: "bad_request", request_id: "r-7", parameter: "shape" });
  await scripted([wrong], async (at, seen) => {
    await assert.rejects(new RemoteVAE(at).decode(LATENTS), (error) => {
      assert.ok(error instanceof RemoteVAEError);
      const { status, type, message, parameter, retryAfter, requestId } = error;
      assert.deepEqual({ status, type, message, parameter, retryAfter, requestId }, {
        status: 400, type: "bad_request", message: "shape is wrong (request r-7)", parameter: "shape", retryAfter: null,
        requestId: "r-7",
      });
      return true;
    });
    assert.equal(seen.length, 1);
  });
});

for (const [name, answer, type, tries] of [
  ["a full server, as often as it is told to", busy, "overloaded", 2],
  ["a model that failed, once", says(503, { error: "No.", code: "model_failed" }, { "retry-after": "30" }), "model_failed", 1],
  ["a path that is not there, once", says(404, { error: "No.", code: "unknown_route" }), "unknown_route", 1],
  ["a proxy that comes up, again", says(404, "Path not found. Ping http://.../-/routes"), "unknown_route", 2],
  ["an ingress that died, again", says(500, "Internal Server Error"), "unavailable", 2],
  ["a stranger's page, once", says(502, "<html>nginx</html>"), "internal_error", 1],
  ["a stranger's refusal, once", says(403, "<html>nginx</html>"), "bad_request", 1],
  ["who asks for too much patience", says(503, { error: "No.", code: "overloaded" }, { "retry-after": "301" }), "overloaded", 1],
  ["a connection that is closed, again", (response) => response.destroy(), "connection_failed", 2],
  ["an answer that breaks off, again", (response) => {
    response.writeHead(200, { "content-type": "image/png", "content-length": "100" });
    response.write("half", () => response.destroy());
  }, "connection_lost", 2],
  ["an answer of another protocol, once", says(200, "<html>", { "content-type": "text/html" }), "broken_reply", 1],
  ["a tensor that is shorter than its shape, once", says(200, "abcd", { shape: "[2]", dtype: "float32" }), "broken_reply", 1],
]) {
  test(`asked: ${name}`, async () => {
    await scripted([answer], async (at, seen) => {
      await assert.rejects(new RemoteVAE(at, { retries: 1 }).decode(LATENTS), { name: "RemoteVAEError", type });
      assert.equal(seen.length, tries);
    });
  });
}

test("nobody at the address is an error of its own, and tells no token", async () => {
  await assert.rejects(new RemoteVAE("http://:s3cret@127.0.0.1:1/sd", { retries: 0 }).decode(LATENTS), (error) => {
    assert.deepEqual([error.type, error.status], ["connection_failed", null]);
    assert.ok(!error.message.includes("s3cret"));
    return true;
  });
});

test("a server that says nothing is given up: by timeout once, by a deadline after as many tries as it allows", async () => {
  await scripted([() => {}], async (at, seen) => {
    const began = performance.now();
    await assert.rejects(new RemoteVAE(at, { timeoutMs: 100 }).decode(LATENTS), { type: "timed_out" });
    assert.equal(seen.length, 1);
    assert.ok(Number(seen[0].headers["x-vae-deadline-ms"]) <= 100);
    await assert.rejects(new RemoteVAE(at, { timeoutMs: 100, deadlineMs: 3000 }).decode(LATENTS), { type: "timed_out" });
    assert.ok(seen.length >= 3);
    assert.ok(performance.now() - began < 6000);
  });
});

test("a deadline tries on where a number of retries would not, and holds", async () => {
  await scripted([busy], async (at, seen) => {
    const began = performance.now();
    await assert.rejects(new RemoteVAE(at, { deadlineMs: 2600 }).decode(LATENTS), { type: "overloaded" });
    assert.ok(performance.now() - began < 4000);
    assert.ok(seen.length >= 2);
  });
});

test("a signal ends a request, a pause and what has not begun, with its own reason", async () => {
  for (const answer of [() => {}, full(20)]) {
    await scripted([answer], async (at, seen) => {
      const control = new AbortController();
      const call = new RemoteVAE(at).decode(LATENTS, { signal: control.signal });
      setTimeout(() => control.abort(new Error("enough")), 200);
      const began = performance.now();
      await assert.rejects(call, { message: "enough" });
      assert.ok(performance.now() - began < 10_000);
      await assert.rejects(new RemoteVAE(at).describe({ signal: control.signal }), { message: "enough" });
      await assert.rejects(new RemoteVAE(at).decode(new Tensor(new Float32Array(8), [2, 4, 1, 1]), { signal: control.signal }), {
        message: "enough",
      });
      assert.equal(seen.length, 1);
    });
  }
});

test("a batch of pictures is a request each, and one that fails ends the others", { timeout: 30_000 }, async () => {
  const batch = new Tensor(Float32Array.from({ length: 12 }, (_, at) => at), [3, 4, 1, 1]);
  await scripted([well], async (at, seen) => {
    const pictures = await new RemoteVAE(at).decode(batch);
    assert.equal(pictures.length, 3);
    assert.equal(seen.length, 3);
  });
  await scripted([well], async (at, seen) => {
    await new RemoteVAE(at).decode(batch, { seed: 2n ** 63n - 2n });
    const seeds = seen.map(({ url }) => new URL(url, at).searchParams.getAll("seed"));
    assert.deepEqual(seeds.sort(), [["0"], ["9223372036854775806"], ["9223372036854775807"]]);
    await new RemoteVAE(at).decode(batch, { seed: 7, outputType: "mp4" });
    assert.deepEqual(new URL(seen[3].url, at).searchParams.getAll("seed"), ["7"]);
  });
  const held = [];
  let left = 2;
  let allEnded;
  const ended = new Promise((resolve) => (allEnded = resolve));
  const hangs = (response) => {
    response.on("close", () => (left -= 1) === 0 && allEnded());
    if (held.push(response) === 3) says(400, { error: "No.", code: "bad_request" })(held[0]);
  };
  await scripted([(response) => held.push(response), hangs], async (at) => {
    await assert.rejects(new RemoteVAE(at).decode(batch), { type: "bad_request" });
    await ended; // else the test never ends
  });
});

test("the real server's floats, pictures and latents are those of the Python client", real, async () => {
  const vae = new RemoteVAE(url);
  const latents = new Tensor(floats("latents.f32"), [2, 4, 8, 8]);
  const decoded = await vae.decode(latents, { outputType: "pt" });
  assert.deepEqual([decoded.dtype, decoded.data], ["float32", floats("decoded.f32")]);
  const [first, second] = await vae.decode(latents, { imageFormat: "png" });
  assert.deepEqual([first.type, await bytesOf(first), await bytesOf(second)], ["image/png", read("0.png"), read("1.png")]);
  const half = Tensor.fromFloat32(latents.data.subarray(0, 256), [1, 4, 8, 8]);
  assert.deepEqual(await bytesOf(await vae.decode(half, { imageFormat: "png", doScaling: false })), read("half.png"));
  const pixels = await vae.decode(latents, { outputType: "pt", partialPostprocess: true });
  assert.deepEqual([pixels.dtype, pixels.shape.at(-1)], ["uint8", 3]);
  for (const image of [new Blob([read("0.png")], { type: "image/png" }), read("0.png"), read("0.png").buffer]) {
    const encoded = await vae.encode(image, { sampleMode: "argmax", doScaling: true });
    assert.deepEqual([encoded.shape, encoded.data], [[1, 4, 8, 8], floats("encoded.f32")]);
  }
  const seeded = await vae.encode(pixels, { seed: 7 });
  assert.deepEqual(seeded.data, floats("seeded.f32"));
});

test("the real server describes itself, and its errors come as they are", real, async () => {
  const model = new URL(url).pathname.slice(1);
  const said = [await new RemoteVAE(url).describe(), await new RemoteVAE(url).describe({ wake: true })];
  assert.deepEqual(said.map(({ name }) => name), [model, model]);
  const models = await listModels(new URL("/", url)); // with the token that stands in it
  assert.ok(models.some(({ name }) => name === model));
  const wrong = new Tensor(new Float32Array(7), [1, 7, 1, 1]);
  await assert.rejects(new RemoteVAE(url).decode(wrong), (error) => {
    assert.deepEqual([error.type, error.status, error.parameter], ["bad_request", 400, "shape"]);
    assert.ok(error.requestId && error.message.includes("(request "));
    return true;
  });
  if (new URL(url).password) {
    await assert.rejects(new RemoteVAE(url, { token: "wrong" }).decode(LATENTS), { type: "unauthorized", status: 401 });
  }
  await assert.rejects(new RemoteVAE(url.replace(/[^/]*$/, "nobody")).decode(LATENTS), { type: "unknown_model", status: 404 });
});
