// As calls.py, by Node's own client.
import { Agent, request } from "node:http";

const [port, requests] = process.argv.slice(2);
const agent = new Agent({ keepAlive: true, maxSockets: 1 });

function call([method, path, length, headers]) {
  return new Promise((resolve, reject) => {
    const options = { port, method, path, headers: { ...headers }, host: "127.0.0.1", agent };
    if (length && !headers["Transfer-Encoding"]) options.headers["Content-Length"] = length;
    const call = request(options, (response) => {
      let received = 0;
      response.on("data", (data) => (received += data.length));
      response.on("end", () => resolve(`${response.statusCode} ${received}`));
    });
    call.on("error", reject);
    if (length) call.write(Buffer.alloc(length >> 1));
    call.end(Buffer.alloc(length - (length >> 1)));
  });
}

for (const one of JSON.parse(requests)) console.log(await call(one));
agent.destroy();
