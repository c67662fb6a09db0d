// Spends CPU time in named functions, as `profiled shares` does: `shares.js MILLISECONDS [called]`.
// It reads a byte first, and prints the truth. With `called`, the event loop calls it for the byte.
'use strict';
const fs = require('fs');

const cpuNs = () => process.cpuUsage().user * 1000;

// Each is a function of its own for the compiler.
function spendMost(ns) {
  const began = cpuNs();
  let x = 1;
  while (cpuNs() < began + ns) for (let i = 0; i < 100000; i++) x = (x * 31 + i) | 0;
  return cpuNs() - began + (x & 1);
}
function spendSome(ns) {
  const began = cpuNs();
  let x = 2;
  while (cpuNs() < began + ns) for (let i = 0; i < 100000; i++) x = (x * 33 + i) | 0;
  return cpuNs() - began + (x & 1);
}
function spendLittle(ns) {
  const began = cpuNs();
  let x = 3;
  while (cpuNs() < began + ns) for (let i = 0; i < 100000; i++) x = (x * 35 + i) | 0;
  return cpuNs() - began + (x & 1);
}
function descend(depth, turns, spent) {
  if (depth > 0) return [depth].map((it) => descend(it - 1, turns, spent))[0];
  for (let turn = 0; turn < turns; turn++) {
    spent[0] += spendMost(7e6);
    spent[1] += spendSome(2e6);
    spent[2] += spendLittle(1e6);
  }
  return 0;
}
function run() {
  const spent = [0, 0, 0];
  descend(8, process.argv[2] / 10, spent);
  console.log(`spendMost ${spent[0]}\nspendSome ${spent[1]}\nspendLittle ${spent[2]}`);
}
if (process.argv[3] === 'called') {
  process.stdin.on('data', run);
} else {
  fs.readSync(0, Buffer.alloc(1));
  run();
}
