// Requests for k6, as a plan in JSON asks for them (see bench/serving/load.py), and a summary of what came back.
import http from 'k6/http';
import exec from 'k6/execution';
import { sleep } from 'k6';
import { Counter, Trend } from 'k6/metrics';

const plan = JSON.parse(open(__ENV.PLAN));
const STATUSES = [200, 429, 503, 504];
const streams = {};
const scenarios = {};

for (const { name, files, ...stream } of plan.streams) {
  const counters = {};
  for (const status of [...STATUSES, 'other']) counters[status] = new Counter(`${name}_${status}`);
  streams[name] = {
    ...stream,
    bodies: files.map((path) => open(path, 'b')),
    counters,
    steady: new Counter(`${name}_steady`),
    mpx: new Counter(`${name}_mpx`),
    latency: new Trend(`${name}_latency`),
    own: new Trend(`${name}_own`),
  };
  scenarios[name] = {
    ...(stream.rate
      ? { executor: 'constant-arrival-rate', rate: Math.max(1, Math.round(stream.rate * 60)), timeUnit: '60s',
          preAllocatedVUs: stream.users, maxVUs: stream.users }
      : { executor: 'constant-vus', vus: stream.users }),
    duration: `${stream.seconds}s`,
    gracefulStop: '90s',
  };
}

export const options = {
  scenarios,
  discardResponseBodies: true,
  summaryTrendStats: ['count', 'avg', 'med', 'p(95)', 'p(99)', 'max'],
  noCookiesReset: true,
};

export default function () {
  const stream = streams[exec.scenario.name];
  const turn = exec.scenario.iterationInTest;
  const begin = exec.scenario.startTime;
  const answer = http.post(plan.url + stream.path, stream.bodies[turn % stream.bodies.length], {
    headers: { 'Content-Type': stream.type },
    timeout: '120s',
  });
  const now = Date.now();
  stream.counters[STATUSES.includes(answer.status) ? answer.status : 'other'].add(1);
  if (answer.status !== 200) {
    if (stream.patient) sleep(Math.min(Number(answer.headers['Retry-After'] || 1), 2));
    return;
  }
  if (now < begin + 1000 * stream.warm || now >= begin + 1000 * stream.seconds) {
    if (!stream.rate) return; // The rate and the latency of a steady crowd: not of its coming and going.
  } else {
    stream.steady.add(1);
    stream.mpx.add(stream.output_mpx[turn % stream.bodies.length]);
  }
  // From when it was due: what a late start hides would be hidden where the load is greatest.
  const due = stream.rate ? now - begin - (1000 * turn) / stream.rate : 0;
  stream.latency.add(Math.max(answer.timings.duration, due));
  const told = (answer.headers['Server-Timing'] || '').matchAll(/(decode|compute|encode);dur=([\d.]+)/g);
  let inside = 0;
  for (const [, , spent] of told) inside += Number(spent);
  stream.own.add(answer.timings.duration - inside);
}

export function handleSummary(data) {
  const found = {};
  for (const [name, metric] of Object.entries(data.metrics)) found[name] = metric.values;
  return { [plan.summary]: JSON.stringify(found) };
}
