// Lets the conformance suite run on Node 20, whose `fs` has no `globSync`: a command that no test
// uses imports it. Used as `node --import ./without_glob.mjs …`; does nothing on later versions.
import fs from 'node:fs';
import { register } from 'node:module';

const withGlob = 'export * from "node:fs"; export const globSync = undefined;';
const hooks = `export function resolve(specifier, context, next) {
  const isSuite = context.parentURL?.includes('/@modelcontextprotocol/conformance/');
  return isSuite && specifier === 'fs'
    ? { url: ${JSON.stringify(`data:text/javascript,${encodeURIComponent(withGlob)}`)}, shortCircuit: true }
    : next(specifier, context);
}`;

if (fs.globSync === undefined) register(`data:text/javascript,${encodeURIComponent(hooks)}`);
